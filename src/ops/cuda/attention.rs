//! Attention as products of cuBLAS around a softmax of our own.
//!
//! A group of segments (a prompt and its branches) has its scores in one matrix, all its queries by all its keys, and the
//! softmax knows which of them a row sees: a few products a group, and one launch over all groups and heads. Where the
//! scores of all heads would take too much memory, some key/value heads are done at a time.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::as_dtype;
use super::driver::{Launch, Onto, Operand, empty, gemm, modules};
use crate::ops::attention::{GPU_SCORES as SCRATCH, Heads, Saved, Segment, Segments};
use crate::ops::dims2;

/// Threads of a row of scores.
const THREADS: u32 = 128;

/// A group's rows and where its scores are.
#[derive(Debug)]
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Elements up to its scores in a head's plane, and from one row to the next.
    start: usize,
    stride: usize,
}

/// How the scores of a batch lie in memory.
#[derive(Debug)]
struct Layout {
    window: Option<usize>,
    blocks: Vec<Block>,
    /// Elements of one head's scores.
    plane: usize,
    /// `Row` of `attention.cu`, eight numbers each.
    rows: Tensor,
    count: usize,
}

/// Those of one batch: it goes through many layers, and those of one window see the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layouts(Arc<Mutex<Vec<Arc<Layout>>>>);

impl Layouts {
    fn get(segments: &Segments, window: Option<usize>, device: &Device) -> Result<Arc<Layout>> {
        let mut known = segments.layouts.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |known: &&Arc<Layout>| known.window == window && known.rows.device().same_device(device);
        if let Some(layout) = known.iter().find(same) {
            return Ok(layout.clone());
        }
        let layout = Arc::new(Layout::of(segments, window, device)?);
        known.push(layout.clone());
        Ok(layout)
    }
}

/// Whether each group's rows follow each other, as a packed batch has them.
pub(crate) fn takes(segments: &Segments) -> bool {
    segments.groups().iter().all(|group| {
        let covered: usize = group.iter().map(|segment| segment.queries.len()).sum();
        covered == bounds(group, |segment| segment.queries.clone()).len()
    })
}

fn bounds(group: &[Segment], of: impl Fn(&Segment) -> Range<usize>) -> Range<usize> {
    let ranges = || group.iter().map(&of).filter(|range| !range.is_empty());
    let start = ranges().map(|range| range.start).min().unwrap_or(0);
    start..ranges().map(|range| range.end).max().unwrap_or(start)
}

impl Layout {
    fn of(segments: &Segments, window: Option<usize>, device: &Device) -> Result<Self> {
        let (mut blocks, mut rows, mut plane) = (Vec::new(), Vec::<u32>::new(), 0usize);
        for group in segments.groups() {
            let queries = bounds(group, |segment| segment.queries.clone());
            if queries.is_empty() {
                continue;
            }
            let prefix = bounds(group, |segment| segment.prefix.clone());
            let own = bounds(group, |segment| segment.own.clone());
            let keys = if prefix.is_empty() { own } else { prefix.start.min(own.start)..prefix.end.max(own.end) };
            // rows of scores begin where 16 bytes can be read at once
            let stride = keys.len().next_multiple_of(8);
            for segment in group {
                for (i, query) in segment.queries.clone().enumerate() {
                    let seen = segment.seen(i, window);
                    let before = segment.prefix.len();
                    let prefix = segment.prefix.start + seen.start.min(before)..segment.prefix.end;
                    let own =
                        segment.own.start + seen.start.saturating_sub(before)..segment.own.start + seen.end - before;
                    let within = |range: Range<usize>| match range.is_empty() {
                        true => [0, 0],
                        false => [(range.start - keys.start) as u32, (range.end - keys.start) as u32],
                    };
                    let offset = (plane + (query - queries.start) * stride) as u64;
                    rows.extend([offset as u32, (offset >> 32) as u32, stride as u32]);
                    rows.extend(within(prefix));
                    rows.extend(within(own));
                    rows.push(query as u32);
                }
            }
            blocks.push(Block { start: plane, stride, queries: queries.clone(), keys });
            plane += queries.len() * stride;
        }
        let count = rows.len() / 8;
        Ok(Self { window, blocks, plane, count, rows: Tensor::from_vec(rows, (count, 8), device)? })
    }
}

/// A matrix of heads: rows of all heads, `dimension` columns each.
#[derive(Clone, Copy)]
struct Matrix<'t> {
    tensor: &'t Tensor,
    heads: usize,
    dimension: usize,
}

impl<'t> Matrix<'t> {
    fn of(tensor: &'t Tensor, heads: usize, dimension: usize) -> Result<Self> {
        let (rows, width) = dims2(tensor)?;
        if width != heads * dimension {
            bail!("attention: {rows} rows of {width} for {heads} heads of {dimension}")
        }
        Ok(Self { tensor, heads, dimension })
    }

    /// Rows from `row` on of head `head`; the next of the batch is `apart` heads on.
    fn at(self, row: usize, head: usize, apart: usize) -> Operand<'t> {
        let width = self.heads * self.dimension;
        let start = row * width + head * self.dimension;
        Operand { tensor: self.tensor, start, row: width, batch: apart * self.dimension, transposed: false }
    }
}

/// Some key/value heads, whose scores are in memory together.
#[derive(Clone, Copy)]
struct Wave<'l> {
    layout: &'l Layout,
    heads: Heads,
    /// The first key/value head and how many.
    first: usize,
    count: usize,
}

impl<'l> Wave<'l> {
    fn all(layout: &'l Layout, heads: Heads, bytes: usize) -> impl Iterator<Item = Self> {
        let of_one = (heads.queries / heads.keys) * layout.plane * bytes;
        let count = (SCRATCH / of_one.max(1)).clamp(1, heads.keys);
        (0..heads.keys).step_by(count).map(move |first| Self {
            layout,
            heads,
            first,
            count: count.min(heads.keys - first),
        })
    }

    /// Query heads that share a key/value head.
    fn shared(self) -> usize {
        self.heads.queries / self.heads.keys
    }

    fn first_query_head(self) -> usize {
        self.first * self.shared()
    }

    /// Room for a number for each score. Between a block's keys and its stride no product writes anything, and the softmax takes
    /// nothing of it.
    fn scratch(self, dtype: DType, device: &Device) -> Result<Tensor> {
        empty(self.count * self.shared() * self.layout.plane, dtype, device)
    }

    /// The scores of a block's query heads number `i` of each key/value head.
    fn scores<'t>(self, scratch: &'t Tensor, block: &Block, i: usize) -> Operand<'t> {
        let plane = self.layout.plane;
        let start = i * plane + block.start;
        Operand { tensor: scratch, start, row: block.stride, batch: self.shared() * plane, transposed: false }
    }

    /// Calls `with` on each block and each of the query heads that share a key/value head: a product for all key/value
    /// heads at once, of so many queries, keys and columns.
    fn each(self, mut with: impl FnMut(&Block, usize, [usize; 3]) -> Result<()>) -> Result<()> {
        for block in &self.layout.blocks {
            for i in 0..self.shared() {
                with(block, i, [block.queries.len(), block.keys.len(), self.heads.dimension])?;
            }
        }
        Ok(())
    }

    /// `a bᵀ` by head, rows of queries by rows of keys.
    fn products(self, a: Matrix<'_>, b: Matrix<'_>, into: &Tensor, scale: f64) -> Result<()> {
        self.each(|block, i, [queries, keys, columns]| {
            let a = a.at(block.queries.start, self.first_query_head() + i, self.shared());
            let b = b.at(block.keys.start, self.first, 1).t();
            gemm([queries, keys, columns], a, b, self.scores(into, block, i), self.count, scale, Onto::Nothing)
        })
    }

    fn rows(self) -> [usize; 2] {
        [self.layout.count, self.count * self.shared()]
    }
}

pub(crate) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &Segments) -> Result<Saved> {
    let (dtype, device) = (q.dtype(), q.device());
    let layout = Layouts::get(segments, heads.window, device)?;
    let output = Tensor::zeros(q.shape(), dtype, device)?;
    let log_sum_exp = Tensor::zeros((dims2(q)?.0, heads.queries), DType::F32, device)?;
    let of = |x, count| Matrix::of(x, count, heads.dimension);
    let (q, k, v, out) = (of(q, heads.queries)?, of(k, heads.keys)?, of(v, heads.keys)?, of(&output, heads.queries)?);
    for wave in Wave::all(&layout, heads, size_of::<f32>() + dtype.size_in_bytes()) {
        let scores = wave.scratch(DType::F32, device)?;
        wave.products(q, k, &scores, heads.scale)?;
        let weights = wave.scratch(dtype, device)?;
        Launch::of(modules::attention, "softmax_forward", &weights)?
            .tensor(&scores)?
            .tensor(&weights)?
            .tensor(&log_sum_exp)?
            .tensor(&layout.rows)?
            .long(layout.plane)
            .count(heads.queries)?
            .count(wave.first_query_head())?
            .float(heads.softcap.unwrap_or(0.0))
            .run(wave.rows(), [THREADS, 1])?;
        wave.each(|block, i, [queries, keys, columns]| {
            let v = v.at(block.keys.start, wave.first, 1);
            let out = out.at(block.queries.start, wave.first_query_head() + i, wave.shared());
            let weights = wave.scores(&weights, block, i);
            gemm([queries, columns, keys], weights, v, out, wave.count, 1.0, Onto::Nothing)
        })?;
    }
    Ok(Saved { output, log_sum_exp })
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
    let (dtype, device) = (q.dtype(), q.device());
    let layout = Layouts::get(segments, heads.window, device)?;
    let (rows, width) = dims2(q)?;
    if d_output.dims() != [rows, width] || saved.output.dims() != [rows, width] {
        bail!("attention: queries of {:?} and a gradient of {:?}", q.shape(), d_output.shape())
    }
    let log_sum_exp = as_dtype(&saved.log_sum_exp, DType::F32)?;
    let delta = empty((rows, heads.queries), DType::F32, device)?;
    Launch::of(modules::attention, "row_dots", d_output)?
        .tensor(d_output)?
        .tensor(&saved.output)?
        .tensor(&delta)?
        .long(rows * heads.queries)
        .count(heads.dimension)?
        .run([(rows * heads.queries).div_ceil(8), 1], [32, 8])?;
    let dq = Tensor::zeros(q.shape(), dtype, device)?;
    // the query heads that share keys and values add up, in f32
    let (dk, dv) = (Tensor::zeros(k.shape(), DType::F32, device)?, Tensor::zeros(v.shape(), DType::F32, device)?);
    {
        let of = |x, count| Matrix::of(x, count, heads.dimension);
        let (q, k, v) = (of(q, heads.queries)?, of(k, heads.keys)?, of(v, heads.keys)?);
        let d_out = of(d_output, heads.queries)?;
        let (of_q, of_k, of_v) = (of(&dq, heads.queries)?, of(&dk, heads.keys)?, of(&dv, heads.keys)?);
        for wave in Wave::all(&layout, heads, 2 * (size_of::<f32>() + dtype.size_in_bytes())) {
            let (scores, d_weights) = (wave.scratch(DType::F32, device)?, wave.scratch(DType::F32, device)?);
            wave.products(q, k, &scores, heads.scale)?;
            wave.products(d_out, v, &d_weights, 1.0)?;
            let (weights, d_scores) = (wave.scratch(dtype, device)?, wave.scratch(dtype, device)?);
            Launch::of(modules::attention, "softmax_backward", &weights)?
                .tensor(&scores)?
                .tensor(&d_weights)?
                .tensor(&log_sum_exp)?
                .tensor(&delta)?
                .tensor(&weights)?
                .tensor(&d_scores)?
                .tensor(&layout.rows)?
                .long(layout.plane)
                .count(heads.queries)?
                .count(wave.first_query_head())?
                .float(heads.softcap.unwrap_or(0.0))
                .float(heads.scale)
                .run(wave.rows(), [THREADS, 1])?;
            drop((scores, d_weights));
            wave.each(|block, i, [queries, keys, columns]| {
                let (first, head, apart) = (wave.first, wave.first_query_head() + i, wave.shared());
                let (weights, d_scores) = (wave.scores(&weights, block, i), wave.scores(&d_scores, block, i));
                let k = k.at(block.keys.start, first, 1);
                let (onto_k, onto_v) = (of_k.at(block.keys.start, first, 1), of_v.at(block.keys.start, first, 1));
                let count = wave.count;
                gemm(
                    [queries, columns, keys],
                    d_scores,
                    k,
                    of_q.at(block.queries.start, head, apart),
                    count,
                    1.0,
                    Onto::Nothing,
                )?;
                gemm(
                    [keys, columns, queries],
                    d_scores.t(),
                    q.at(block.queries.start, head, apart),
                    onto_k,
                    count,
                    1.0,
                    Onto::Existing,
                )?;
                gemm(
                    [keys, columns, queries],
                    weights.t(),
                    d_out.at(block.queries.start, head, apart),
                    onto_v,
                    count,
                    1.0,
                    Onto::Existing,
                )
            })?;
        }
    }
    Ok((dq, dk.to_dtype(dtype)?, dv.to_dtype(dtype)?))
}
