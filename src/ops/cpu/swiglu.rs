//! SwiGLU over all elements.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Real, for_real, tensor, values, vectorised};
use crate::ops::dims2;

/// Elements a task works on.
const BLOCK: usize = 4096;

pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let shape = dims2(gate)?;
    for_real!(gate, T => tensor(product::<T>(&values(gate)?, &values(up)?), shape))
}

pub(crate) fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = dims2(gate)?;
    for_real!(gate, T => {
        let (dgate, dup) = gradients::<T>(&values(dh)?, &values(gate)?, &values(up)?);
        Ok((tensor(dgate, shape)?, tensor(dup, shape)?))
    })
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    (T::of(1.0) + (-x).exp_in_loop()).recip()
}

fn product<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    let mut h = vec![T::of(0.0); gate.len()];
    let blocks = h.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK));
    blocks.for_each(|((h, gate), up)| {
        vectorised(
            #[inline(always)]
            || {
                for ((h, &e), &u) in h.iter_mut().zip(gate).zip(up) {
                    *h = e * sigmoid(e) * u;
                }
            },
        );
    });
    h
}

fn gradients<T: Real>(dh: &[T], gate: &[T], up: &[T]) -> (Vec<T>, Vec<T>) {
    let mut dgate = vec![T::of(0.0); gate.len()];
    let mut dup = vec![T::of(0.0); gate.len()];
    let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
    let inputs = dh.par_chunks(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK));
    outputs.zip(inputs).for_each(|((dgate, dup), ((dh, gate), up))| {
        vectorised(
            #[inline(always)]
            || {
                for ((((dgate, dup), &dh), &e), &up) in dgate.iter_mut().zip(dup).zip(dh).zip(gate).zip(up) {
                    let sigma = sigmoid(e);
                    *dgate = dh * up * sigma * (T::of(1.0) + e * (T::of(1.0) - sigma));
                    *dup = dh * e * sigma;
                }
            },
        );
    });
    (dgate, dup)
}
