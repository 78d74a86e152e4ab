//! Attention, a tile of query rows at a time, parallel over (segment, head) forward and (group, key head) backward.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, Onto, Threads, gemm};
use super::{Real, dot, for_real, max_of, sum_of, tensor, values, vectorised};
use crate::ops::attention::{Heads, Saved, Segment, Segments};
use crate::ops::dims2;

/// Query rows whose scores are held at once: with a thousand keys a tile of f32 scores is 256 KB, which stays in the
/// second-level cache.
pub(crate) const TILE: usize = 64;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &Segments) -> Result<Saved> {
    let (rows, width) = dims2(q)?;
    check(width, dims2(k)?, dims2(v)?, heads)?;
    for_real!(q, T => {
        let (q, k, v) = (values::<T>(q)?, values::<T>(k)?, values::<T>(v)?);
        let inputs = Inputs { q: &q, k: &k, v: &v, heads };
        let (output, log_sum_exp) = inputs.forward(segments, rows);
        Ok(Saved { output: tensor(output, (rows, width))?, log_sum_exp: tensor(log_sum_exp, (rows, heads.queries))? })
    })
}

pub(crate) fn backward(
    d_output: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    saved: &Saved,
    heads: Heads,
    segments: &Segments,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (q_shape, k_shape) = (dims2(q)?, dims2(k)?);
    check(q_shape.1, k_shape, dims2(v)?, heads)?;
    for_real!(q, T => {
        let (q, k, v) = (values::<T>(q)?, values::<T>(k)?, values::<T>(v)?);
        let inputs = Inputs { q: &q, k: &k, v: &v, heads };
        let (output, lse) = (values::<T>(&saved.output)?, values::<T>(&saved.log_sum_exp)?);
        let (dq, dk, dv) = inputs.backward(&values(d_output)?, &output, &lse, segments);
        Ok((tensor(dq, q_shape)?, tensor(dk, k_shape)?, tensor(dv, k_shape)?))
    })
}

fn check(width: usize, k: (usize, usize), v: (usize, usize), heads: Heads) -> Result<()> {
    let Heads { queries, keys, dimension, .. } = heads;
    if width != queries * dimension || k != v || k.1 != keys * dimension || queries % keys != 0 {
        candle_core::bail!("attention: {width} query columns, keys {k:?}, values {v:?}, {heads:?}")
    }
    Ok(())
}

struct Inputs<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    heads: Heads,
}

/// A tile of one segment's query rows and the key rows that its last row sees.
struct Tile<'s> {
    segment: &'s Segment,
    /// Query numbers within the segment.
    rows: Range<usize>,
    /// Keys seen by the last row: the width of the score matrix.
    width: usize,
}

impl<'s> Tile<'s> {
    fn of(segment: &'s Segment) -> impl Iterator<Item = Tile<'s>> {
        (0..segment.queries.len()).step_by(TILE).map(|start| {
            let rows = start..(start + TILE).min(segment.queries.len());
            let width = segment.visible(rows.end - 1);
            Tile { segment, rows, width }
        })
    }

    /// First row in the query matrix.
    fn first(&self) -> usize {
        self.segment.queries.start + self.rows.start
    }

    /// The visible key rows as (first column in the score matrix, rows of the key matrix).
    fn key_ranges(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let Segment { prefix, own, .. } = self.segment;
        let own = own.start..own.start + self.width - prefix.len();
        [(0, prefix.clone()), (prefix.len(), own)].into_iter().filter(|(_, rows)| !rows.is_empty())
    }
}

impl<'a, T: Real> Inputs<'a, T> {
    /// Rows of head `head` of a matrix with `heads` heads.
    fn rows<'b>(&self, of: &'b [T], heads: usize, head: usize, rows: Range<usize>) -> Matrix<'b, T> {
        let e = self.heads.dimension;
        let start = rows.start * heads * e + head * e;
        Matrix::strided(&of[start..], rows.len(), e, heads * e)
    }

    fn queries(&self, head: usize, rows: Range<usize>) -> Matrix<'a, T> {
        self.rows(self.q, self.heads.queries, head, rows)
    }

    fn keys(&self, of: &'a [T], head: usize, rows: Range<usize>) -> Matrix<'a, T> {
        self.rows(of, self.heads.keys, head, rows)
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.heads.queries / self.heads.keys)
    }

    /// `scores = scale · Q Kᵀ` of a tile, `[rows, width]`.
    fn scores(&self, head: usize, tile: &Tile<'_>, scores: &mut Vec<T>) {
        let q = self.queries(head, tile.first()..tile.first() + tile.rows.len());
        scores.resize(tile.rows.len() * tile.width, T::of(0.0));
        for (column, rows) in tile.key_ranges() {
            let k = self.keys(self.k, self.key_head(head), rows);
            let scale = self.heads.scale;
            gemm(&mut scores[column..], tile.width, Onto::Nothing, scale, q, k.t(), Threads::One);
        }
    }

    fn forward(&self, segments: &Segments, total_rows: usize) -> (Vec<T>, Vec<T>) {
        let Heads { queries: heads, dimension: e, .. } = self.heads;
        let tasks: Vec<(&Segment, usize)> = segments
            .groups()
            .iter()
            .flatten()
            .flat_map(|segment| (0..heads).map(move |head| (segment, head)))
            .collect();
        let blocks: Vec<(Vec<T>, Vec<T>)> =
            tasks.par_iter().map(|&(segment, head)| self.forward_head(segment, head)).collect();
        let mut output = vec![T::of(0.0); total_rows * heads * e];
        let mut log_sum_exp = vec![T::of(0.0); total_rows * heads];
        for (&(segment, head), (block, lse)) in tasks.iter().zip(&blocks) {
            for (i, row) in segment.queries.clone().enumerate() {
                let at = row * heads * e + head * e;
                output[at..at + e].copy_from_slice(&block[i * e..(i + 1) * e]);
                log_sum_exp[row * heads + head] = lse[i];
            }
        }
        (output, log_sum_exp)
    }

    /// One head of one segment: the output rows `[n, E]` and their log-sum-exp `[n]`.
    fn forward_head(&self, segment: &Segment, head: usize) -> (Vec<T>, Vec<T>) {
        let e = self.heads.dimension;
        let mut output = vec![T::of(0.0); segment.queries.len() * e];
        let mut log_sum_exp = Vec::with_capacity(segment.queries.len());
        let mut scores = Vec::new();
        for tile in Tile::of(segment) {
            self.scores(head, &tile, &mut scores);
            for (i, row) in scores.chunks_exact_mut(tile.width).enumerate() {
                let (seen, hidden) = row.split_at_mut(segment.visible(tile.rows.start + i));
                log_sum_exp.push(vectorised(
                    #[inline(always)]
                    || softmax(seen),
                ));
                hidden.fill(T::of(0.0));
            }
            let out = &mut output[tile.rows.start * e..tile.rows.end * e];
            let mut onto = Onto::Nothing;
            for (column, rows) in tile.key_ranges() {
                let weights = Matrix::strided(&scores[column..], tile.rows.len(), rows.len(), tile.width);
                let v = self.keys(self.v, self.key_head(head), rows);
                gemm(out, e, onto, 1.0, weights, v, Threads::One);
                onto = Onto::Existing;
            }
        }
        (output, log_sum_exp)
    }

    fn backward(
        &self,
        d_output: &[T],
        output: &[T],
        log_sum_exp: &[T],
        segments: &Segments,
    ) -> (Vec<T>, Vec<T>, Vec<T>) {
        let Heads { queries: heads, keys, dimension: e, .. } = self.heads;
        let per_key = heads / keys;
        let saved = Results { d_output, output, log_sum_exp };
        let tasks: Vec<(&[Segment], usize)> =
            segments.groups().iter().flat_map(|group| (0..keys).map(move |key| (group.as_slice(), key))).collect();
        let blocks: Vec<Block<T>> =
            tasks.par_iter().map(|&(group, key)| self.backward_group(group, key, &saved)).collect();
        let mut dq = vec![T::of(0.0); self.q.len()];
        let mut dk = vec![T::of(0.0); self.k.len()];
        let mut dv = vec![T::of(0.0); self.v.len()];
        for (&(group, key), block) in tasks.iter().zip(&blocks) {
            let mut from = block.dq.chunks_exact(per_key * e);
            for row in group.iter().flat_map(|segment| segment.queries.clone()) {
                let at = row * heads * e + key * per_key * e;
                let from = from.next().expect("as many rows as the group has queries");
                dq[at..at + per_key * e].copy_from_slice(from);
            }
            for (i, row) in block.rows.clone().enumerate() {
                let at = row * keys * e + key * e;
                dk[at..at + e].copy_from_slice(&block.dk[i * e..(i + 1) * e]);
                dv[at..at + e].copy_from_slice(&block.dv[i * e..(i + 1) * e]);
            }
        }
        (dq, dk, dv)
    }

    /// Everything one key/value head of one group contributes to.
    fn backward_group(&self, group: &[Segment], key: usize, saved: &Results<'_, T>) -> Block<T> {
        let Heads { queries: heads, keys, dimension: e, scale } = self.heads;
        let per_key = heads / keys;
        let ranges = || group.iter().flat_map(|s| [&s.prefix, &s.own]).filter(|r| !r.is_empty());
        let start = ranges().map(|r| r.start).min().unwrap_or(0);
        let end = ranges().map(|r| r.end).max().unwrap_or(start);
        let queries: usize = group.iter().map(|s| s.queries.len()).sum();
        let mut dq = vec![T::of(0.0); queries * per_key * e];
        let mut dk = vec![T::of(0.0); (end - start) * e];
        let mut dv = vec![T::of(0.0); (end - start) * e];
        let (mut weights, mut d_scores) = (Vec::new(), Vec::new());
        let mut first_query = 0;
        for segment in group {
            for tile in Tile::of(segment) {
                let (n, width) = (tile.rows.len(), tile.width);
                let rows = tile.first()..tile.first() + n;
                for head in key * per_key..(key + 1) * per_key {
                    let d_out = self.rows(saved.d_output, heads, head, rows.clone());
                    self.scores(head, &tile, &mut weights);
                    d_scores.resize(n * width, T::of(0.0));
                    for (column, keys) in tile.key_ranges() {
                        let v = self.keys(self.v, key, keys);
                        let dst = &mut d_scores[column..];
                        gemm(dst, width, Onto::Nothing, 1.0, d_out, v.t(), Threads::One);
                    }
                    let pairs = weights.chunks_exact_mut(width).zip(d_scores.chunks_exact_mut(width));
                    for (i, (weights, d_scores)) in pairs.enumerate() {
                        let (lse, row_sum) = saved.row(heads, e, rows.start + i, head);
                        let seen = segment.visible(tile.rows.start + i);
                        vectorised(
                            #[inline(always)]
                            || {
                                for (weight, d_score) in weights[..seen].iter_mut().zip(&mut d_scores[..seen]) {
                                    *weight = (*weight - lse).exp_in_loop();
                                    *d_score = *weight * (*d_score - row_sum);
                                }
                            },
                        );
                        weights[seen..].fill(T::of(0.0));
                        d_scores[seen..].fill(T::of(0.0));
                    }
                    let dq_at = (first_query + tile.rows.start) * per_key * e + (head - key * per_key) * e;
                    let q = self.queries(head, rows.clone());
                    let mut onto = Onto::Nothing;
                    for (column, keys) in tile.key_ranges() {
                        let part = |of| Matrix::strided(of, n, keys.len(), width);
                        let (weights, d_scores) = (part(&weights[column..]), part(&d_scores[column..]));
                        let k = self.keys(self.k, key, keys.clone());
                        gemm(&mut dq[dq_at..], per_key * e, onto, scale, d_scores, k, Threads::One);
                        let at = (keys.start - start) * e;
                        gemm(&mut dk[at..], e, Onto::Existing, scale, d_scores.t(), q, Threads::One);
                        gemm(&mut dv[at..], e, Onto::Existing, 1.0, weights.t(), d_out, Threads::One);
                        onto = Onto::Existing;
                    }
                }
            }
            first_query += segment.queries.len();
        }
        Block { rows: start..end, dq, dk, dv }
    }
}

/// Turns scores into weights, and gives their log-sum-exp.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T]) -> T {
    let largest = max_of(scores);
    for score in scores.iter_mut() {
        *score = (*score - largest).exp_in_loop();
    }
    let sum = sum_of(scores.len(), |i| scores[i]);
    let share = sum.recip();
    for score in scores {
        *score *= share;
    }
    largest + sum.ln()
}

/// What the forward pass gave, and the gradient that came back, `[T, H·E]` and `[T, H]`.
struct Results<'a, T> {
    d_output: &'a [T],
    output: &'a [T],
    log_sum_exp: &'a [T],
}

impl<T: Real> Results<'_, T> {
    /// A row's log-sum-exp and `⟨dO, O⟩`.
    fn row(&self, heads: usize, e: usize, row: usize, head: usize) -> (T, T) {
        let at = row * heads * e + head * e;
        let sum = vectorised(
            #[inline(always)]
            || dot(&self.d_output[at..at + e], &self.output[at..at + e]),
        );
        (self.log_sum_exp[row * heads + head], sum)
    }
}

/// The gradients of one key/value head of one group.
struct Block<T> {
    /// Key/value rows of `dk` and `dv`.
    rows: Range<usize>,
    /// `[queries of the group, query heads of the key head · E]`
    dq: Vec<T>,
    /// `[rows, E]`
    dk: Vec<T>,
    /// `[rows, E]`
    dv: Vec<T>,
}
