//! Causal attention over the segments of one packed batch, with grouped key/value heads.
//!
//! A packed batch holds many sequences in one `[T, D]` matrix. Nothing is masked and nothing padded: a [`Segment`]
//! names the rows that ask and the rows they may look at, and each segment is a few dense products. A branch that
//! shares its prompt with others is a segment with a `prefix`.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Form, cpu, form};

/// Query rows and the key/value rows they see: all of `prefix`, and `own` causally, aligned at its end (the last
/// query sees all of `own`, the one before it all but the last row).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the query matrix.
    pub queries: Range<usize>,
    /// Key/value rows that every query sees.
    pub prefix: Range<usize>,
    /// Key/value rows seen causally; at least as many as `queries`.
    pub own: Range<usize>,
}

impl Segment {
    /// Key/value rows, the prefix first, up to the last that query number `i` of the segment sees: its own.
    pub(crate) fn visible(&self, i: usize) -> usize {
        self.prefix.len() + self.own.len() - self.queries.len() + i + 1
    }

    /// The key/value rows, counted with the prefix first, that query number `i` of the segment sees.
    pub(crate) fn seen(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.visible(i);
        window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// The segments of a batch, in groups: segments of one group may share key/value rows, those of different groups
/// never do.
#[derive(Debug, Clone, Default)]
pub struct Segments {
    groups: Vec<Vec<Segment>>,
    /// What a GPU knows of them, made once for all layers and clones.
    #[cfg(feature = "cuda")]
    pub(super) layouts: super::cuda::attention::Layouts,
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.groups == other.groups
    }
}

impl Eq for Segments {}

impl Segments {
    /// Segments by group.
    ///
    /// # Panics
    /// Where a segment has more queries than rows of its own (it would look into the future), or where two segments
    /// have query rows or own rows in common.
    #[must_use]
    pub fn new(groups: Vec<Vec<Segment>>) -> Self {
        let all = || groups.iter().flatten();
        assert!(all().all(|s| s.queries.len() <= s.own.len()), "a segment asks past its own rows");
        for mut ranges in [all().map(|s| &s.queries).collect::<Vec<_>>(), all().map(|s| &s.own).collect()] {
            ranges.sort_by_key(|range| range.start);
            assert!(ranges.windows(2).all(|two| two[0].end <= two[1].start), "two segments have a row in common");
        }
        Self {
            groups,
            #[cfg(feature = "cuda")]
            layouts: Default::default(),
        }
    }

    /// The groups, in row order.
    #[must_use]
    pub fn groups(&self) -> &[Vec<Segment>] {
        &self.groups
    }

    /// Multiply-adds of one head dimension: query/key pairs that are looked at, without a window.
    #[must_use]
    pub fn pairs(&self) -> u64 {
        let of = |s: &Segment| (0..s.queries.len()).map(|i| s.visible(i) as u64).sum::<u64>();
        self.groups.iter().flatten().map(of).sum()
    }
}

/// How the columns of queries, keys and values divide into heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads `H`.
    pub queries: usize,
    /// Key/value heads `K`; `H` is a multiple of it.
    pub keys: usize,
    /// Head dimension `E`.
    pub dimension: usize,
    /// What scores are multiplied by before the softmax, usually `E^-½`.
    pub scale: f64,
    /// Scores `s` become `c tanh(s / c)`.
    pub softcap: Option<f64>,
    /// Rows that a query sees at most, itself the last.
    pub window: Option<usize>,
}

/// On a GPU: bytes of scores, weights and their gradients that are held at once, if one key/value head alone takes no more.
/// Memory is planned by it.
pub(crate) const GPU_SCORES: usize = 1 << 29;

/// What [`backward`] needs besides the inputs.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The result, `[T, H·E]`.
    pub output: Tensor,
    /// Log-sum-exp of the scaled scores, `[T, H]`.
    pub log_sum_exp: Tensor,
}

/// Attention of `q [Tq, H·E]` over `k, v [Tk, K·E]`.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &Segments) -> Result<Saved> {
    match form(q) {
        Form::Cpu => return cpu::attention::forward(q, k, v, heads, segments),
        #[cfg(feature = "cuda")]
        Form::Cuda if cuda::attention::takes(segments) => return cuda::attention::forward(q, k, v, heads, segments),
        _ => {}
    }
    let (rows, _) = q.dims2()?;
    let mut output = q.zeros_like()?;
    let mut log_sum_exp = Tensor::zeros((rows, heads.queries), q.dtype(), q.device())?;
    for segment in segments.groups.iter().flatten() {
        let Parts { q, k, v, mask } = Parts::of(q, k, v, heads, segment)?;
        let (scores, _) = capped(&(q.matmul(&k.t()?)? * heads.scale)?, heads.softcap)?;
        let scores = scores.broadcast_add(&mask)?;
        let lse = scores.log_sum_exp(D::Minus1)?;
        let weights = scores.broadcast_sub(&lse.unsqueeze(D::Minus1)?)?.exp()?;
        let rows = &segment.queries;
        output = output.slice_scatter(&merge(&weights.matmul(&v)?)?, 0, rows.start)?;
        log_sum_exp = log_sum_exp.slice_scatter(&lse.t()?.contiguous()?, 0, rows.start)?;
    }
    Ok(Saved { output, log_sum_exp })
}

/// The gradients of `q`, `k` and `v`.
///
/// With `P` the softmax, `dP = dO Vᵀ`, `dS = P ⊙ (dP − rowsum(dO ⊙ O))`, times `1 − (S/c)²` where scores are capped:
/// `dQ = s dS K`, `dK = s dSᵀ Q`, `dV = Pᵀ dO`, key/value gradients summed over the query heads of their group and over the segments that share the rows.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn backward(
    d_output: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    saved: &Saved,
    heads: Heads,
    segments: &Segments,
) -> Result<(Tensor, Tensor, Tensor)> {
    match form(q) {
        Form::Cpu => return cpu::attention::backward(d_output, q, k, v, saved, heads, segments),
        #[cfg(feature = "cuda")]
        Form::Cuda if cuda::attention::takes(segments) => {
            return cuda::attention::backward(d_output, q, k, v, saved, heads, segments);
        }
        _ => {}
    }
    let (mut dq, mut dk, mut dv) = (q.zeros_like()?, k.zeros_like()?, v.zeros_like()?);
    let per_head = |x: &Tensor, rows: &Range<usize>| split(x, rows, heads.queries, heads.dimension);
    for segment in segments.groups.iter().flatten() {
        let rows = &segment.queries;
        let d_out = per_head(d_output, rows)?;
        let out = per_head(&saved.output, rows)?;
        let lse = saved.log_sum_exp.narrow(0, rows.start, rows.len())?.t()?.unsqueeze(D::Minus1)?;
        let Parts { q, k, v, mask } = Parts::of(q, k, v, heads, segment)?;
        let (scores, slope) = capped(&(q.matmul(&k.t()?)? * heads.scale)?, heads.softcap)?;
        let weights = scores.broadcast_add(&mask)?.broadcast_sub(&lse)?.exp()?;
        let d_weights = d_out.matmul(&v.t()?)?;
        let row_sums = (&d_out * &out)?.sum_keepdim(D::Minus1)?;
        let d_scores = ((&weights * d_weights.broadcast_sub(&row_sums)?)? * (slope * heads.scale)?)?;
        dq = dq.slice_scatter(&merge(&d_scores.matmul(&k)?)?, 0, rows.start)?;
        let d_keys = sum_groups(&d_scores.transpose(1, 2)?.contiguous()?.matmul(&q)?, heads)?;
        let d_values = sum_groups(&weights.transpose(1, 2)?.contiguous()?.matmul(&d_out)?, heads)?;
        for (total, part) in [(&mut dk, d_keys), (&mut dv, d_values)] {
            let mut at = 0;
            for range in [&segment.prefix, &segment.own] {
                if !range.is_empty() {
                    let here = part.narrow(0, at, range.len())?;
                    let sum = (total.narrow(0, range.start, range.len())? + here)?;
                    *total = total.slice_scatter(&sum, 0, range.start)?;
                    at += range.len();
                }
            }
        }
    }
    Ok((dq, dk, dv))
}

/// Scores `s` as `c tanh(s / c)`, and the derivative `1 − tanh²(s / c)`; as they are where there is no cap.
fn capped(scores: &Tensor, cap: Option<f64>) -> Result<(Tensor, Tensor)> {
    match cap {
        None => Ok((scores.clone(), scores.ones_like()?)),
        Some(cap) => {
            let tanh = (scores / cap)?.tanh()?;
            Ok(((&tanh * cap)?, (1.0 - tanh.sqr()?)?))
        }
    }
}

/// One segment's inputs by head, for the composed form: `q [H, n, E]`, `k, v [H, m, E]` (each key/value head repeated
/// for its query heads) and `mask [n, m]`, zero where visible and negative infinity elsewhere.
struct Parts {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
}

impl Parts {
    fn of(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segment: &Segment) -> Result<Self> {
        let (n, m) = (segment.queries.len(), segment.prefix.len() + segment.own.len());
        let repeated = |x: &Tensor| {
            let mut parts = Vec::new();
            for range in [&segment.prefix, &segment.own] {
                if !range.is_empty() {
                    parts.push(split(x, range, heads.keys, heads.dimension)?);
                }
            }
            let x = Tensor::cat(&parts, 1)?.unsqueeze(1)?;
            let groups = heads.queries / heads.keys;
            x.repeat((1, groups, 1, 1))?.reshape((heads.queries, m, heads.dimension))
        };
        let hidden =
            |i: usize, j: usize| if segment.seen(i, heads.window).contains(&j) { 0.0 } else { f64::NEG_INFINITY };
        let mask: Vec<f64> = (0..n).flat_map(|i| (0..m).map(move |j| hidden(i, j))).collect();
        let mask = Tensor::from_vec(mask, (n, m), &candle_core::Device::Cpu)?;
        let mask = mask.to_dtype(if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
        Ok(Self {
            q: split(q, &segment.queries, heads.queries, heads.dimension)?,
            k: repeated(k)?,
            v: repeated(v)?,
            mask: mask.to_dtype(q.dtype())?.to_device(q.device())?,
        })
    }
}

/// Rows of `x [T, heads·E]` as `[heads, n, E]`.
fn split(x: &Tensor, rows: &Range<usize>, heads: usize, dimension: usize) -> Result<Tensor> {
    let x = x.narrow(0, rows.start, rows.len())?.reshape((rows.len(), heads, dimension))?;
    x.transpose(0, 1)?.contiguous()
}

/// `[heads, n, E]` as `[n, heads·E]`.
fn merge(x: &Tensor) -> Result<Tensor> {
    let (heads, rows, dimension) = x.dims3()?;
    x.transpose(0, 1)?.reshape((rows, heads * dimension))
}

/// `[H, m, E]` summed over the query heads of each key/value head, as `[m, K·E]`.
fn sum_groups(x: &Tensor, heads: Heads) -> Result<Tensor> {
    let rows = x.dims()[1];
    let x = x.reshape((heads.keys, heads.queries / heads.keys, rows, heads.dimension))?;
    merge(&x.sum(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    const HEADS: Heads = Heads { queries: 4, keys: 2, dimension: 3, scale: 0.6, softcap: None, window: None };
    /// A window that leaves the prompt, one that lies within a branch, caps that bend the scores.
    const ALL: [Heads; 4] = [
        HEADS,
        Heads { window: Some(4), ..HEADS },
        Heads { softcap: Some(0.7), ..HEADS },
        Heads { window: Some(2), softcap: Some(1.1), ..HEADS },
    ];

    /// A prompt of 3 rows with branches of 2 and 4, then a sequence of 5 rows on its own.
    fn segments() -> Segments {
        let causal = |rows: Range<usize>| Segment { queries: rows.clone(), prefix: 0..0, own: rows };
        let branch = |rows: Range<usize>| Segment { queries: rows.clone(), prefix: 0..3, own: rows };
        Segments::new(vec![vec![causal(0..3), branch(3..5), branch(5..9)], vec![causal(9..14)]])
    }

    fn inputs() -> Result<(Tensor, Tensor, Tensor, Tensor)> {
        Ok((normal(1, (14, 12))?, normal(2, (14, 6))?, normal(3, (14, 6))?, normal(4, (14, 12))?))
    }

    #[test]
    fn backward_agrees_with_finite_differences() -> Result<()> {
        let (q, k, v, d_out) = inputs()?;
        for heads in ALL {
            let saved = forward(&q, &k, &v, heads, &segments())?;
            let (dq, dk, dv) = backward(&d_out, &q, &k, &v, &saved, heads, &segments())?;
            let value = |q: &Tensor, k: &Tensor, v: &Tensor| {
                (forward(q, k, v, heads, &segments())?.output * &d_out)?.sum_all()
            };
            finite_difference(&q, &dq, |q| value(q, &k, &v))?;
            finite_difference(&k, &dk, |k| value(&q, k, &v))?;
            finite_difference(&v, &dv, |v| value(&q, &k, v))?;
        }
        Ok(())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (q, k, v, d_out) = inputs()?;
        for heads in ALL {
            let both = || {
                let saved = forward(&q, &k, &v, heads, &segments())?;
                let (dq, dk, dv) = backward(&d_out, &q, &k, &v, &saved, heads, &segments())?;
                Ok([saved.output, saved.log_sum_exp, dq, dk, dv])
            };
            for (kernel, plain) in both()?.iter().zip(&composed(both)?) {
                close(kernel, plain, 1e-12)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_shared_prompt_equals_two_sequences() -> Result<()> {
        // rows: prompt 0..3, branch 3..5, branch 5..9; apart: 0..3 ++ 3..5 and 0..3 ++ 5..9
        let (q, k, v, _) = inputs()?;
        for (heads, branch) in ALL.into_iter().flat_map(|heads| [(heads, 3..5usize), (heads, 5..9)]) {
            let shared = forward(&q, &k, &v, heads, &segments())?.output;
            let pick = |x: &Tensor| Tensor::cat(&[x.narrow(0, 0, 3)?, x.narrow(0, branch.start, branch.len())?], 0);
            let rows = 0..3 + branch.len();
            let alone = Segments::new(vec![vec![Segment { queries: rows.clone(), prefix: 0..0, own: rows }]]);
            let apart = forward(&pick(&q)?, &pick(&k)?, &pick(&v)?, heads, &alone)?.output;
            close(&apart, &pick(&shared)?, 1e-14)?;
        }
        Ok(())
    }

    #[test]
    fn queries_after_a_cache_see_all_of_it() -> Result<()> {
        // the last two of five rows, asked with the keys of all five
        let (q, k, v, _) = inputs()?;
        let (q, k, v) = (q.narrow(0, 9, 5)?.contiguous()?, k.narrow(0, 9, 5)?, v.narrow(0, 9, 5)?);
        let (k, v) = (k.contiguous()?, v.contiguous()?);
        let at = |queries: Range<usize>| Segments::new(vec![vec![Segment { queries, prefix: 0..0, own: 0..5 }]]);
        let all = forward(&q, &k, &v, HEADS, &at(0..5))?.output;
        let late = forward(&q.narrow(0, 3, 2)?.contiguous()?, &k, &v, HEADS, &at(0..2))?.output;
        close(&late, &all.narrow(0, 3, 2)?.contiguous()?, 1e-14)
    }

    #[test]
    fn a_long_segment_crosses_the_kernels_tiles() -> Result<()> {
        let rows = cpu::attention::TILE * 2 + 5;
        let heads = Heads { queries: 2, keys: 1, dimension: 4, scale: 0.5, softcap: None, window: None };
        let (q, k, v) = (normal(1, (rows, 8))?, normal(2, (rows, 4))?, normal(3, (rows, 4))?);
        let d_out = normal(4, (rows, 8))?;
        let segments = Segments::new(vec![vec![Segment { queries: 0..rows, prefix: 0..0, own: 0..rows }]]);
        // within a tile, over two, and all
        for window in [Some(20), Some(cpu::attention::TILE + 9), None] {
            let heads = Heads { window, ..heads };
            let both = || {
                let saved = forward(&q, &k, &v, heads, &segments)?;
                let (dq, dk, dv) = backward(&d_out, &q, &k, &v, &saved, heads, &segments)?;
                Ok([saved.output, saved.log_sum_exp, dq, dk, dv])
            };
            for (kernel, plain) in both()?.iter().zip(&composed(both)?) {
                close(kernel, plain, 1e-11)?;
            }
        }
        Ok(())
    }
}
