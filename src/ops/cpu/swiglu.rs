//! SwiGLU over all elements.

use candle_core::{Result, Tensor};

use super::{Real, filled, for_real, tensor, values, vectorised};
use crate::ops::dims2;
use crate::ops::swiglu::Backward;

/// Elements a task works on.
const BLOCK: usize = 4096;

pub(crate) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let shape = dims2(gate)?;
    for_real!(gate, T => tensor(product::<T>(&values(gate)?, &values(up)?), shape))
}

pub(crate) fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Backward> {
    let shape = dims2(gate)?;
    for_real!(gate, T => {
        let [h, d_gate, d_up] = gradients::<T>(&values(dh)?, &values(gate)?, &values(up)?);
        Ok(Backward { h: tensor(h, shape)?, d_gate: tensor(d_gate, shape)?, d_up: tensor(d_up, shape)? })
    })
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    (T::of(1.0) + (-x).exp_in_loop()).recip()
}

fn product<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    let [h] = filled(gate.len(), BLOCK, |block, [h]| {
        let [gate, up] = [gate, up].map(|of| &of[block * BLOCK..][..h.len()]);
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

fn gradients<T: Real>(dh: &[T], gate: &[T], up: &[T]) -> [Vec<T>; 3] {
    filled(gate.len(), BLOCK, |block, [h, d_gate, d_up]| {
        let [dh, gate, up] = [dh, gate, up].map(|of| &of[block * BLOCK..][..h.len()]);
        let outputs = h.iter_mut().zip(d_gate).zip(d_up);
        let inputs = dh.iter().zip(gate).zip(up);
        vectorised(
            #[inline(always)]
            || {
                for (((h, d_gate), d_up), ((&dh, &e), &up)) in outputs.zip(inputs) {
                    let sigma = sigmoid(e);
                    let silu = e * sigma;
                    *h = silu * up;
                    *d_gate = dh * up * sigma * (T::of(1.0) + e * (T::of(1.0) - sigma));
                    *d_up = dh * silu;
                }
            },
        );
    })
}
