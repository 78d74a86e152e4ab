//! Frozen matrices over one input, each with a low-rank update: cuBLAS for the matrix and for what is narrow on one side,
//! a kernel of our own for the tail, which has to add onto what the matrix gave.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

use super::as_dtype;
use super::driver::{Launch, Onto, Operand, empty, gemm, modules};
use super::weight::matrix;
use crate::ops::{FEW, dims2};
use crate::quant::Weight;

/// `x wᵀ`, in the type of `x`.
pub(crate) fn matmul_t(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((rows, inner), (width, _)) = (dims2(x)?, dims2(w)?);
    let w = as_dtype(w, x.dtype())?;
    let y = empty((rows, width), x.dtype(), x.device())?;
    gemm([rows, width, inner], Operand::of(x)?, Operand::of(&w)?.t(), Operand::of(&y)?, 1, 1.0, Onto::Nothing)?;
    Ok(y)
}

/// `scale · x w`, with some columns of `x`, in the type of `x`.
pub(crate) fn matmul(x: &Tensor, columns: Range<usize>, w: &Tensor, scale: f64) -> Result<Tensor> {
    let ((rows, _), (inner, width)) = (dims2(x)?, dims2(w)?);
    if columns.len() != inner {
        bail!("{} columns by a matrix of {inner} rows", columns.len())
    }
    let w = as_dtype(w, x.dtype())?;
    let y = empty((rows, width), x.dtype(), x.device())?;
    let x = Operand::of(x)?.columns(columns.start);
    gemm([rows, width, inner], x, Operand::of(&w)?, Operand::of(&y)?, 1, scale, Onto::Nothing)?;
    Ok(y)
}

/// `scale · xᵀ y` in f32, with some columns of each: the gradient of an adapter's matrix.
pub(crate) fn outer(x: &Tensor, of_x: Range<usize>, y: &Tensor, of_y: Range<usize>, scale: f64) -> Result<Tensor> {
    let rows = dims2(x)?.0;
    let (m, n) = (of_x.len(), of_y.len());
    if rows != dims2(y)?.0 || x.dtype() != y.dtype() {
        bail!("gradients of {:?} and {:?}", x.shape(), y.shape())
    }
    let out = empty((m, n), DType::F32, x.device())?;
    let (x, y) = (Operand::of(x)?.columns(of_x.start).t(), Operand::of(y)?.columns(of_y.start));
    gemm([m, n, rows], x, y, Operand::of(&out)?, 1, scale, Onto::Nothing)?;
    Ok(out)
}

/// How the narrow matrix of an update lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Narrow {
    /// `B [columns, R]`
    B,
    /// `A [R, columns]`
    A,
}

/// Adds `scale · u w` to `y`, with some columns of `u`.
pub(crate) fn add_low_rank(
    y: &Tensor,
    u: &Tensor,
    of_u: Range<usize>,
    w: &Tensor,
    narrow: Narrow,
    scale: f64,
) -> Result<()> {
    let ((rows, columns), (_, width)) = (dims2(y)?, dims2(u)?);
    let rank = of_u.len();
    let (shape, column_stride, rank_stride) = match narrow {
        Narrow::B => ([columns, rank], rank, 1),
        Narrow::A => ([rank, columns], 1, columns),
    };
    if w.dims() != shape || u.dtype() != y.dtype() || dims2(u)?.0 != rows || of_u.end > width {
        bail!("an update of {:?} and {:?} onto {:?}", u.shape(), w.shape(), y.shape())
    }
    // `u`'s columns begin within its rows, which a tensor's view may do as long as rows are apart by `width`
    let (u, w) = (u.flatten_all()?, as_dtype(w, DType::F32)?);
    let u = u.narrow(0, of_u.start, u.elem_count() - of_u.start)?;
    Launch::of(modules::low_rank, "add_low_rank", y)?
        .tensor(y)?
        .tensor(&u)?
        .tensor(&w)?
        .count(rows)?
        .count(columns)?
        .count(rank)?
        .count(width)?
        .long(column_stride)
        .long(rank_stride)
        .float(scale)
        .run([columns.div_ceil(64), rows.div_ceil(64)], [256, 1])
}

/// `residual + x Wᵀ + bias`
pub(crate) fn product_t(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let ((rows, inner), (width, columns)) = (dims2(x)?, weight.dims()?);
    if inner != columns || residual.is_some_and(|residual| residual.dims() != [rows, width]) {
        bail!("rows of {inner} by a matrix of {columns} columns")
    }
    let (y, onto) = match residual {
        Some(residual) => (residual.copy()?, Onto::Existing),
        None => (empty((rows, width), x.dtype(), x.device())?, Onto::Nothing),
    };
    match weight {
        Weight::OnDevice(blocks) if rows <= FEW => blocks.few(x, &y, onto)?,
        _ => {
            let w = matrix(weight, x.dtype(), x.device())?;
            gemm([rows, width, inner], Operand::of(x)?, Operand::of(&w)?.t(), Operand::of(&y)?, 1, 1.0, onto)?;
        }
    }
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
        None => Ok(y),
    }
}

/// `Σ dy W`
pub(crate) fn sum_of_products<'t>(terms: impl Iterator<Item = (&'t Tensor, &'t Weight)>) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (dy, weight) in terms {
        let ((rows, inner), (width, columns)) = (dims2(dy)?, weight.dims()?);
        if inner != width {
            bail!("gradients of {inner} columns by a matrix of {width} rows")
        }
        let w = matrix(weight, dy.dtype(), dy.device())?;
        let (dx, onto) = match sum {
            Some(dx) => (dx, Onto::Existing),
            None => (empty((rows, columns), dy.dtype(), dy.device())?, Onto::Nothing),
        };
        gemm([rows, columns, inner], Operand::of(dy)?, Operand::of(&w)?, Operand::of(&dx)?, 1, 1.0, onto)?;
        sum = Some(dx);
    }
    sum.ok_or_else(|| candle_core::Error::Msg("no branch".into()))
}
