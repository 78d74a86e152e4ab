//! Attention, a tile of query rows at a time, parallel over segments and key heads.
//!
//! The query heads that share a key head are stacked: one product with the keys serves them all, and in the backward
//! pass the sum over them comes with the product.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::gemm::{Matrix, Onto, Threads, gemm};
use super::{Real, SendPtr, dot, filled, for_real, max_of, sum_of, tensor, values, vectorised};
use crate::ops::attention::{Heads, Saved, Segment, Segments};
use crate::ops::dims2;

/// The most query rows of a tile. With a thousand keys the scores of a tile take 800 KB in f32, which stays in the
/// second-level cache.
pub(crate) const TILE: usize = 64;
/// Rows of a tile's stacked heads aimed at.
const STACKED_ROWS: usize = 192;

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &Segments) -> Result<Saved> {
    let (rows, width) = dims2(q)?;
    check((rows, width), dims2(k)?, dims2(v)?, heads, segments)?;
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
    check(q_shape, k_shape, dims2(v)?, heads, segments)?;
    let lse_shape = (q_shape.0, heads.queries);
    if dims2(d_output)? != q_shape || dims2(&saved.output)? != q_shape || dims2(&saved.log_sum_exp)? != lse_shape {
        candle_core::bail!("attention: the gradient is not of the shape of the queries {q_shape:?}")
    }
    for_real!(q, T => {
        let (q, k, v) = (values::<T>(q)?, values::<T>(k)?, values::<T>(v)?);
        let inputs = Inputs { q: &q, k: &k, v: &v, heads };
        let (output, lse, d_output) = (values::<T>(&saved.output)?, values(&saved.log_sum_exp)?, values(d_output)?);
        let results = Results { d_output: &d_output, output: &output, log_sum_exp: &lse };
        let (dq, dk, dv) = inputs.backward(&results, segments);
        Ok((tensor(dq, q_shape)?, tensor(dk, k_shape)?, tensor(dv, k_shape)?))
    })
}

fn check(q: (usize, usize), k: (usize, usize), v: (usize, usize), heads: Heads, segments: &Segments) -> Result<()> {
    let Heads { queries, keys, dimension, .. } = heads;
    if q.1 != queries * dimension || k != v || k.1 != keys * dimension || queries % keys != 0 {
        candle_core::bail!("attention: {} query columns, keys {k:?}, values {v:?}, {heads:?}", q.1)
    }
    let inside = |s: &Segment| s.queries.end <= q.0 && s.prefix.end <= k.0 && s.own.end <= k.0;
    if !segments.groups().iter().flatten().all(inside) {
        candle_core::bail!("attention: a segment reaches past the {} query rows or {} key rows", q.0, k.0)
    }
    Ok(())
}

struct Inputs<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    heads: Heads,
}

/// What the forward pass gave, and the gradient that came back, `[T, H·E]` and `[T, H]`.
struct Results<'a, T> {
    d_output: &'a [T],
    output: &'a [T],
    log_sum_exp: &'a [T],
}

/// Memory that a thread uses again for tile after tile.
struct Scratch<T> {
    q: Vec<T>,
    d_out: Vec<T>,
    scores: Vec<T>,
    d_scores: Vec<T>,
    sums: Vec<T>,
    result: Vec<T>,
}

impl<T> Scratch<T> {
    fn new() -> Self {
        let new = Vec::new;
        Self { q: new(), d_out: new(), scores: new(), d_scores: new(), sums: new(), result: new() }
    }
}

/// A tile of one segment's query rows and the key rows that they see.
struct Tile<'s> {
    segment: &'s Segment,
    window: Option<usize>,
    /// Query numbers within the segment.
    rows: Range<usize>,
    /// The keys seen, prefix first, from the first row's first to the last row's last: the columns of the score matrix.
    keys: Range<usize>,
}

impl<'s> Tile<'s> {
    fn of(segment: &'s Segment, per_key: usize, window: Option<usize>) -> impl Iterator<Item = Tile<'s>> {
        let step = (STACKED_ROWS / per_key).clamp(16, TILE);
        (0..segment.queries.len()).step_by(step).map(move |start| {
            let rows = start..(start + step).min(segment.queries.len());
            let keys = segment.seen(rows.start, window).start..segment.visible(rows.end - 1);
            Tile { segment, window, rows, keys }
        })
    }

    /// Width of the score matrix.
    fn width(&self) -> usize {
        self.keys.len()
    }

    /// Columns of the score matrix that query number `i` of the tile sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let seen = self.segment.seen(self.rows.start + i, self.window);
        seen.start - self.keys.start..seen.end - self.keys.start
    }

    /// Its rows in the query matrix.
    fn query_rows(&self) -> Range<usize> {
        let start = self.segment.queries.start;
        start + self.rows.start..start + self.rows.end
    }

    /// The visible key rows as (first column in the score matrix, rows of the key matrix).
    fn key_ranges(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let Segment { prefix, own, .. } = self.segment;
        let Range { start, end } = self.keys;
        let shared = prefix.start + start.min(prefix.len())..prefix.end;
        let skipped = start.saturating_sub(prefix.len());
        let own = own.start + skipped..own.start + end - prefix.len();
        let before = shared.len();
        [(0, shared), (before, own)].into_iter().filter(|(_, rows)| !rows.is_empty())
    }
}

/// Every segment with every key head, the most work first: the last to finish is then a small one.
fn tasks(segments: &Segments, keys: usize) -> Vec<(&Segment, usize)> {
    let all = segments.groups().iter().flatten();
    let mut tasks: Vec<_> = all.flat_map(|segment| (0..keys).map(move |key| (segment, key))).collect();
    let work = |segment: &Segment| segment.queries.len() * (segment.prefix.len() + segment.own.len());
    tasks.sort_by_key(|(segment, _)| std::cmp::Reverse(work(segment)));
    tasks
}

impl<'a, T: Real> Inputs<'a, T> {
    fn per_key(&self) -> usize {
        self.heads.queries / self.heads.keys
    }

    /// Some rows of one head of keys or values.
    fn keys(&self, of: &'a [T], key: usize, rows: Range<usize>) -> Matrix<'a, T> {
        let Heads { keys, dimension: e, .. } = self.heads;
        let start = (rows.start * keys + key) * e;
        Matrix::strided(&of[start..], rows.len(), e, keys * e)
    }

    /// The query heads of key head `key` at `rows` of a `[T, H·E]` matrix, one head's rows below the other's, times
    /// `scale`.
    fn stack(&self, of: &[T], key: usize, rows: Range<usize>, scale: f64, stacked: &mut Vec<T>) {
        let Heads { queries: heads, dimension: e, .. } = self.heads;
        let scale = T::of(scale);
        stacked.clear();
        for head in key * self.per_key()..(key + 1) * self.per_key() {
            for row in rows.clone() {
                stacked.extend(of[(row * heads + head) * e..][..e].iter().map(|&x| x * scale));
            }
        }
    }

    /// Writes stacked rows back to where [`Inputs::stack`] would read them.
    ///
    /// # Safety
    /// `to` points to a matrix of the size of the queries, whose `rows` no other task writes in these heads.
    #[expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]
    unsafe fn unstack(&self, stacked: &[T], key: usize, rows: Range<usize>, to: SendPtr<T>) {
        let Heads { queries: heads, dimension: e, .. } = self.heads;
        let places = (key * self.per_key()..(key + 1) * self.per_key())
            .flat_map(|head| rows.clone().map(move |row| (row * heads + head) * e));
        for (from, place) in stacked.chunks_exact(e).zip(places) {
            // SAFETY: a row of a head inside the matrix, by the caller's promise written by this task alone.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), to.get().add(place), e);
            }
        }
    }

    /// `Q Kᵀ` (or `dO Vᵀ`) of a tile's stacked rows, `[stacked, width]`.
    fn scores(&self, stacked: &[T], of: &'a [T], key: usize, tile: &Tile<'_>, scores: &mut Vec<T>) {
        let e = self.heads.dimension;
        let stacked = Matrix::new(stacked, stacked.len() / e, e);
        scores.resize(stacked.rows() * tile.width(), T::of(0.0));
        for (column, rows) in tile.key_ranges() {
            let k = self.keys(of, key, rows);
            gemm(&mut scores[column..], tile.width(), Onto::Nothing, 1.0, stacked, k.t(), Threads::One);
        }
    }

    fn forward(&self, segments: &Segments, total_rows: usize) -> (Vec<T>, Vec<T>) {
        let Heads { queries: heads, keys, dimension: e, .. } = self.heads;
        let [mut output] = filled(total_rows * heads * e, heads * e, |_, _| {});
        let [mut log_sum_exp] = filled(total_rows * heads, heads, |_, _| {});
        let (to_output, to_lse) = (SendPtr::new(&mut output), SendPtr::new(&mut log_sum_exp));
        tasks(segments, keys).into_par_iter().with_max_len(1).for_each_init(Scratch::new, |scratch, task| {
            self.forward_task(task, scratch, to_output, to_lse);
        });
        (output, log_sum_exp)
    }

    fn forward_task(&self, task: (&Segment, usize), scratch: &mut Scratch<T>, output: SendPtr<T>, lse: SendPtr<T>) {
        let Heads { queries: heads, dimension: e, scale, softcap, .. } = self.heads;
        let ((segment, key), per_key) = (task, self.per_key());
        let Scratch { q, scores, sums, result, .. } = scratch;
        for tile in Tile::of(segment, per_key, self.heads.window) {
            let (n, width) = (tile.rows.len(), tile.width());
            self.stack(self.q, key, tile.query_rows(), scale, q);
            self.scores(q, self.k, key, &tile, scores);
            sums.clear();
            for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                let seen = tile.seen(i % n);
                row[..seen.start].fill(T::of(0.0));
                row[seen.end..].fill(T::of(0.0));
                let row = &mut row[seen];
                let (sum, log_sum_exp) = vectorised(
                    #[inline(always)]
                    || {
                        if let Some(cap) = softcap {
                            row.iter_mut().for_each(|score| *score = capped(*score, T::of(cap)));
                        }
                        exponentials(row)
                    },
                );
                sums.push(sum);
                let (row, head) = (tile.query_rows().start + i % n, key * per_key + i / n);
                // SAFETY: inside `[T, H]`; this head of these query rows is this task's alone, since the query rows of
                // segments do not overlap.
                #[expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]
                unsafe {
                    lse.get().add(row * heads + head).write(log_sum_exp);
                }
            }
            result.resize(per_key * n * e, T::of(0.0));
            let mut onto = Onto::Nothing;
            for (column, rows) in tile.key_ranges() {
                let weights = Matrix::strided(&scores[column..], per_key * n, rows.len(), width);
                gemm(result, e, onto, 1.0, weights, self.keys(self.v, key, rows), Threads::One);
                onto = Onto::Existing;
            }
            // the weights are divided by their sum here, where there are fewer numbers
            for (row, sum) in result.chunks_exact_mut(e).zip(sums.iter()) {
                let share = sum.recip();
                row.iter_mut().for_each(|x| *x *= share);
            }
            // SAFETY: the output is of the size of the queries, and the query rows of segments do not overlap.
            #[expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]
            unsafe {
                self.unstack(result, key, tile.query_rows(), output);
            }
        }
    }

    fn backward(&self, results: &Results<'_, T>, segments: &Segments) -> (Vec<T>, Vec<T>, Vec<T>) {
        let Heads { queries: heads, keys, dimension: e, .. } = self.heads;
        let [mut dq] = filled(self.q.len(), heads * e, |_, _| {});
        let [mut dk, mut dv] = filled(self.k.len(), keys * e, |_, _| {});
        let to = [&mut dq, &mut dk, &mut dv].map(|matrix| SendPtr::new(matrix));
        let shared: Vec<_> = tasks(segments, keys)
            .into_par_iter()
            .with_max_len(1)
            .map_init(Scratch::new, |scratch, task| self.backward_task(task, results, scratch, to))
            .collect();
        // what branches owe to the rows of their prompt, in the order of the tasks
        for Shared { prefix, key, dk: from_k, dv: from_v } in shared.into_iter().flatten() {
            for (to, from) in [(&mut dk, from_k), (&mut dv, from_v)] {
                for (row, from) in prefix.clone().zip(from.chunks_exact(e)) {
                    for (to, &from) in to[(row * keys + key) * e..][..e].iter_mut().zip(from) {
                        *to += from;
                    }
                }
            }
        }
        (dq, dk, dv)
    }

    /// Everything that one segment contributes with one key head; what belongs to a shared prompt is returned.
    fn backward_task(
        &self,
        task: (&Segment, usize),
        results: &Results<'_, T>,
        scratch: &mut Scratch<T>,
        [dq, dk, dv]: [SendPtr<T>; 3],
    ) -> Option<Shared<T>> {
        let Heads { queries: heads, keys, dimension: e, scale, softcap, .. } = self.heads;
        let ((segment, key), per_key) = (task, self.per_key());
        let Segment { prefix, own, .. } = segment;
        let seen = prefix.len() + own.len();
        let (mut sum_k, mut sum_v) = (vec![T::of(0.0); seen * e], vec![T::of(0.0); seen * e]);
        let Scratch { q, d_out, scores: weights, d_scores, result, .. } = scratch;
        for tile in Tile::of(segment, per_key, self.heads.window) {
            let (n, width) = (tile.rows.len(), tile.width());
            let stacked = per_key * n;
            self.stack(self.q, key, tile.query_rows(), scale, q);
            self.stack(results.d_output, key, tile.query_rows(), 1.0, d_out);
            self.scores(q, self.k, key, &tile, weights);
            self.scores(d_out, self.v, key, &tile, d_scores);
            let rows = weights.chunks_exact_mut(width).zip(d_scores.chunks_exact_mut(width));
            for (i, ((weights, d_scores), d_out)) in rows.zip(d_out.chunks_exact(e)).enumerate() {
                let place = (tile.query_rows().start + i % n) * heads + key * per_key + i / n;
                let (lse, output) = (results.log_sum_exp[place], &results.output[place * e..][..e]);
                let seen = tile.seen(i % n);
                for hidden in [0..seen.start, seen.end..width] {
                    weights[hidden.clone()].fill(T::of(0.0));
                    d_scores[hidden].fill(T::of(0.0));
                }
                let (weights, d_scores) = (&mut weights[seen.clone()], &mut d_scores[seen]);
                vectorised(
                    #[inline(always)]
                    || {
                        let row_sum = dot(d_out, output);
                        let rows = weights.iter_mut().zip(d_scores);
                        match softcap.map(T::of) {
                            None => rows.for_each(|(weight, d_score)| {
                                *weight = (*weight - lse).exp_in_loop();
                                *d_score = *weight * (*d_score - row_sum);
                            }),
                            Some(cap) => rows.for_each(|(weight, d_score)| {
                                let score = capped(*weight, cap);
                                *weight = (score - lse).exp_in_loop();
                                let slope = T::of(1.0) - (score / cap) * (score / cap);
                                *d_score = *weight * (*d_score - row_sum) * slope;
                            }),
                        }
                    },
                );
            }
            result.resize(stacked * e, T::of(0.0));
            let mut onto = Onto::Nothing;
            for (column, rows) in tile.key_ranges() {
                let part = |of| Matrix::strided(of, stacked, rows.len(), width);
                let (weights, d_scores) = (part(&weights[column..]), part(&d_scores[column..]));
                let k = self.keys(self.k, key, rows.clone());
                gemm(result, e, onto, scale, d_scores, k, Threads::One);
                // the queries carry the scale already
                let (q, d_out) = (Matrix::new(q, stacked, e), Matrix::new(d_out, stacked, e));
                let at = (tile.keys.start + column) * e;
                gemm(&mut sum_k[at..], e, Onto::Existing, 1.0, d_scores.t(), q, Threads::One);
                gemm(&mut sum_v[at..], e, Onto::Existing, 1.0, weights.t(), d_out, Threads::One);
                onto = Onto::Existing;
            }
            // SAFETY: `dq` is of the size of the queries, and the query rows of segments do not overlap.
            #[expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]
            unsafe {
                self.unstack(result, key, tile.query_rows(), dq);
            }
        }
        for (to, from) in [(dk, &sum_k), (dv, &sum_v)] {
            for (row, from) in own.clone().zip(from[prefix.len() * e..].chunks_exact(e)) {
                // SAFETY: `dk` and `dv` are of the size of the keys; the own rows of segments do not overlap, so this
                // head of them is this task's alone.
                #[expect(unsafe_code, reason = "tasks write disjoint blocks of one matrix")]
                unsafe {
                    std::ptr::copy_nonoverlapping(from.as_ptr(), to.get().add((row * keys + key) * e), e);
                }
            }
        }
        sum_k.truncate(prefix.len() * e);
        sum_v.truncate(prefix.len() * e);
        (!prefix.is_empty()).then(|| Shared { prefix: prefix.clone(), key, dk: sum_k, dv: sum_v })
    }
}

/// The gradients of one key head of a prompt's rows by one of its branches, `[prefix, E]`.
struct Shared<T> {
    prefix: Range<usize>,
    key: usize,
    dk: Vec<T>,
    dv: Vec<T>,
}

/// `c tanh(s / c)`
#[inline(always)]
fn capped<T: Real>(score: T, cap: T) -> T {
    cap * (score / cap).tanh_in_loop()
}

/// Turns scores into `e^(score − largest)`; gives their sum and their log-sum-exp.
#[inline(always)]
fn exponentials<T: Real>(scores: &mut [T]) -> (T, T) {
    let largest = max_of(scores);
    for score in scores.iter_mut() {
        *score = (*score - largest).exp_in_loop();
    }
    let sum = sum_of(scores.len(), |i| scores[i]);
    (sum, largest + sum.ln())
}
