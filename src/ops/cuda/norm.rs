//! RMSNorm over rows.

use candle_core::{DType, Result, Tensor, bail};

use super::as_dtype;
use super::driver::{Launch, empty, modules};
use crate::ops::dims2;

/// Threads by rows of a block: rows that a warp goes through in a few steps are taken by a warp each.
fn block(width: usize) -> [u32; 2] {
    if width <= 1024 { [32, 8] } else { [256, 1] }
}

fn grid(rows: usize, width: usize) -> [usize; 2] {
    [rows.div_ceil(block(width)[1] as usize), 1]
}

fn checked(x: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (rows, width) = dims2(x)?;
    if weight.dims() != [width] {
        bail!("norm: rows of {width} and a weight of {:?}", weight.shape())
    }
    Ok((rows, width))
}

fn scales(rho: &Tensor, rows: usize) -> Result<Tensor> {
    if rho.dims() != [rows] {
        bail!("norm: {rows} rows and scales of {:?}", rho.shape())
    }
    as_dtype(rho, DType::F32)
}

pub(crate) fn forward(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let (rows, width) = checked(x, weight)?;
    let weight = as_dtype(weight, DType::F32)?;
    let y = empty((rows, width), x.dtype(), x.device())?;
    let rho = empty(rows, DType::F32, x.device())?;
    Launch::of(modules::norm, "norm_forward", x)?
        .tensor(x)?
        .tensor(&weight)?
        .tensor(&y)?
        .tensor(&rho)?
        .count(rows)?
        .count(width)?
        .float(epsilon)
        .run(grid(rows, width), block(width))?;
    Ok((y, rho))
}

pub(crate) fn again(x: &Tensor, weight: &Tensor, rho: &Tensor) -> Result<Tensor> {
    let (rows, width) = checked(x, weight)?;
    let (weight, rho) = (as_dtype(weight, DType::F32)?, scales(rho, rows)?);
    let y = empty((rows, width), x.dtype(), x.device())?;
    Launch::of(modules::norm, "norm_again", x)?
        .tensor(x)?
        .tensor(&weight)?
        .tensor(&rho)?
        .tensor(&y)?
        .count(rows)?
        .count(width)?
        .run(grid(rows, width), block(width))?;
    Ok(y)
}

pub(crate) fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rho: &Tensor,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, width) = checked(x, weight)?;
    let (weight, rho) = (as_dtype(weight, DType::F32)?, scales(rho, rows)?);
    for other in std::iter::once(dy).chain(onto) {
        if other.dims() != [rows, width] || other.dtype() != x.dtype() {
            bail!("norm: [{rows}, {width}] and a gradient of {:?}", other.shape())
        }
    }
    let dx = empty((rows, width), x.dtype(), x.device())?;
    Launch::of(modules::norm, "norm_backward", x)?
        .tensor(dy)?
        .tensor(x)?
        .tensor(&weight)?
        .tensor(&rho)?
        .optional(onto)?
        .tensor(&dx)?
        .count(rows)?
        .count(width)?
        .run(grid(rows, width), block(width))?;
    Ok(dx)
}
