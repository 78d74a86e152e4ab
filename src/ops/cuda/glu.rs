//! The gated linear unit over all elements.

use candle_core::{Result, Tensor, bail};

use super::driver::{Launch, THREADS, empty, grid, modules};
use crate::ops::dims2;
use crate::ops::glu::{Activation, Backward};

fn kernel(way: &str, activation: Activation) -> String {
    let activation = match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu",
    };
    format!("glu_{way}_{activation}")
}

fn same(gate: &Tensor, others: &[&Tensor]) -> Result<()> {
    match others.iter().find(|other| other.dims() != gate.dims() || other.dtype() != gate.dtype()) {
        Some(other) => bail!("glu: {:?} and {:?}", gate.shape(), other.shape()),
        None => Ok(()),
    }
}

pub(crate) fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    same(gate, &[up])?;
    let h = empty(dims2(gate)?, gate.dtype(), gate.device())?;
    Launch::of(modules::glu, &kernel("forward", activation), gate)?
        .tensor(gate)?
        .tensor(up)?
        .tensor(&h)?
        .long(gate.elem_count())
        .run(grid(gate.elem_count()), [THREADS, 1])?;
    Ok(h)
}

pub(crate) fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Backward> {
    same(gate, &[up, dh])?;
    let new = || empty(dims2(gate)?, gate.dtype(), gate.device());
    let (h, d_gate, d_up) = (new()?, new()?, new()?);
    Launch::of(modules::glu, &kernel("backward", activation), gate)?
        .tensor(dh)?
        .tensor(gate)?
        .tensor(up)?
        .tensor(&h)?
        .tensor(&d_gate)?
        .tensor(&d_up)?
        .long(gate.elem_count())
        .run(grid(gate.elem_count()), [THREADS, 1])?;
    Ok(Backward { h, d_gate, d_up })
}
