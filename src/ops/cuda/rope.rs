//! Rotary position embedding of queries and keys, in one launch.

use candle_core::{DType, Result, Tensor, bail};

use super::as_dtype;
use super::driver::{LANES, Launch, THREADS, empty, modules};
use crate::ops::dims2;
use crate::ops::rope::Turn;

/// A matrix of heads and the cosines and sines of its rows.
pub(crate) type Turned<'t> = (&'t Tensor, &'t Tensor, &'t Tensor);

/// One matrix or two.
pub(crate) fn turn(matrices: &[Turned<'_>], way: Turn) -> Result<Vec<Tensor>> {
    let [(like, cos, _), ..] = matrices else { return Ok(Vec::new()) };
    let half = dims2(cos)?.1;
    let mut items = 0;
    let mut out = Vec::new();
    let mut angles = Vec::new();
    for &(x, cos, sin) in matrices {
        let (rows, width) = dims2(x)?;
        let fits =
            half > 0 && width.is_multiple_of(2 * half) && cos.dims() == [rows, half] && sin.dims() == [rows, half];
        if !fits || x.dtype() != like.dtype() {
            bail!("rope: {rows} rows of {width} and angles of {:?}", cos.shape())
        }
        items += rows * (width / (2 * half)) * half.div_ceil(LANES);
        out.push(empty((rows, width), x.dtype(), x.device())?);
        angles.push([as_dtype(cos, DType::F32)?, as_dtype(sin, DType::F32)?]);
    }
    let mut launch = Launch::of(modules::rope, "rope", like)?;
    for (((x, ..), y), [cos, sin]) in matrices.iter().zip(&out).zip(&angles) {
        let (rows, width) = dims2(x)?;
        launch = launch.tensor(x)?.tensor(y)?.tensor(cos)?.tensor(sin)?.count(rows)?.count(width / (2 * half))?;
    }
    for _ in matrices.len()..2 {
        launch = launch.optional(None)?.optional(None)?.optional(None)?.optional(None)?.count(0)?.count(0)?;
    }
    let sign = if way == Turn::Forward { 1.0 } else { -1.0 };
    launch.count(half)?.float(sign).run([items.div_ceil(THREADS as usize), 1], [THREADS, 1])?;
    Ok(out)
}
