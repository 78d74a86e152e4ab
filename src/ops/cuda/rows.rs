//! Rows added to rows, several to one where it was taken several times.

use candle_core::{Result, Tensor};

use super::driver::{LANES, Launch, THREADS, empty, modules};
use crate::ops::dims2;

/// `onto` with row `i` of `x` added to its row `rows[i]`; the rows are there.
pub(crate) fn scatter_add(onto: &Tensor, rows: &[u32], x: &Tensor) -> Result<Tensor> {
    let (total, columns) = dims2(onto)?;
    // the sources of each row one after the other, in their order
    let mut starts = vec![0u32; total + 1];
    for &row in rows {
        starts[row as usize + 1] += 1;
    }
    for row in 0..total {
        starts[row + 1] += starts[row];
    }
    let (mut next, mut sources) = (starts.clone(), vec![0u32; rows.len()]);
    for (source, &row) in (0..).zip(rows) {
        sources[next[row as usize] as usize] = source;
        next[row as usize] += 1;
    }
    let (starts, sources) = (Tensor::new(starts, onto.device())?, Tensor::new(sources, onto.device())?);
    let (onto, x) = (onto.contiguous()?, x.contiguous()?);
    let y = empty((total, columns), onto.dtype(), onto.device())?;
    let threads = total * columns.div_ceil(LANES);
    Launch::of(modules::rows, "add_rows", &y)?
        .tensor(&onto)?
        .tensor(&x)?
        .tensor(&starts)?
        .tensor(&sources)?
        .tensor(&y)?
        .count(total)?
        .count(columns)?
        .run([threads.div_ceil(THREADS as usize), 1], [THREADS, 1])?;
    Ok(y)
}
