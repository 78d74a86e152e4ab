//! The gated linear unit over all elements.

use candle_core::{Result, Tensor};

use super::{Real, filled, for_real, tensor, values, vectorised};
use crate::ops::dims2;
use crate::ops::glu::{Activation, Backward, CUBIC, SLOPE};

/// Elements a task works on.
const BLOCK: usize = 4096;

pub(crate) fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let shape = dims2(gate)?;
    for_real!(gate, T => {
        let (gate, up) = (values::<T>(gate)?, values::<T>(up)?);
        let h = match activation {
            Activation::Silu => product::<T, Silu>(&gate, &up),
            Activation::GeluTanh => product::<T, GeluTanh>(&gate, &up),
        };
        tensor(h, shape)
    })
}

pub(crate) fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Backward> {
    let shape = dims2(gate)?;
    for_real!(gate, T => {
        let (dh, gate, up) = (values::<T>(dh)?, values::<T>(gate)?, values::<T>(up)?);
        let [h, d_gate, d_up] = match activation {
            Activation::Silu => gradients::<T, Silu>(&dh, &gate, &up),
            Activation::GeluTanh => gradients::<T, GeluTanh>(&dh, &gate, &up),
        };
        Ok(Backward { h: tensor(h, shape)?, d_gate: tensor(d_gate, shape)?, d_up: tensor(d_up, shape)? })
    })
}

/// `act(e) = e σ(z(e))`
trait Activate {
    fn z<T: Real>(e: T) -> T;
    fn slope_of_z<T: Real>(e: T) -> T;
}

struct Silu;

impl Activate for Silu {
    #[inline(always)]
    fn z<T: Real>(e: T) -> T {
        e
    }

    #[inline(always)]
    fn slope_of_z<T: Real>(_: T) -> T {
        T::of(1.0)
    }
}

struct GeluTanh;

impl Activate for GeluTanh {
    #[inline(always)]
    fn z<T: Real>(e: T) -> T {
        T::of(SLOPE) * e * (T::of(1.0) + T::of(CUBIC) * e * e)
    }

    #[inline(always)]
    fn slope_of_z<T: Real>(e: T) -> T {
        T::of(SLOPE) * (T::of(1.0) + T::of(3.0 * CUBIC) * e * e)
    }
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    (T::of(1.0) + (-x).exp_in_loop()).recip()
}

fn product<T: Real, A: Activate>(gate: &[T], up: &[T]) -> Vec<T> {
    let [h] = filled(gate.len(), BLOCK, |block, [h]| {
        let [gate, up] = [gate, up].map(|of| &of[block * BLOCK..][..h.len()]);
        vectorised(
            #[inline(always)]
            || {
                for ((h, &e), &u) in h.iter_mut().zip(gate).zip(up) {
                    *h = e * sigmoid(A::z(e)) * u;
                }
            },
        );
    });
    h
}

fn gradients<T: Real, A: Activate>(dh: &[T], gate: &[T], up: &[T]) -> [Vec<T>; 3] {
    filled(gate.len(), BLOCK, |block, [h, d_gate, d_up]| {
        let [dh, gate, up] = [dh, gate, up].map(|of| &of[block * BLOCK..][..h.len()]);
        let outputs = h.iter_mut().zip(d_gate).zip(d_up);
        let inputs = dh.iter().zip(gate).zip(up);
        vectorised(
            #[inline(always)]
            || {
                for (((h, d_gate), d_up), ((&dh, &e), &up)) in outputs.zip(inputs) {
                    let sigma = sigmoid(A::z(e));
                    let activated = e * sigma;
                    *h = activated * up;
                    *d_gate = dh * up * sigma * (T::of(1.0) + e * (T::of(1.0) - sigma) * A::slope_of_z(e));
                    *d_up = dh * activated;
                }
            },
        );
    })
}
