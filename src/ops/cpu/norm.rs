//! RMSNorm over rows.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Real, dot, for_real, sum_of, tensor, values};
use crate::ops::dims2;

pub(crate) fn forward(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    for_real!(x, T => {
        let (rows, d) = dims2(x)?;
        let rho = inverse_rms::<T>(&values(x)?, d, epsilon);
        let y = scaled::<T>(&values(x)?, &values(weight)?, &rho);
        Ok((tensor(y, (rows, d))?, tensor(rho, rows)?))
    })
}

pub(crate) fn again(x: &Tensor, weight: &Tensor, rho: &Tensor) -> Result<Tensor> {
    for_real!(x, T => tensor(scaled::<T>(&values(x)?, &values(weight)?, &values(rho)?), dims2(x)?))
}

pub(crate) fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, rho: &Tensor) -> Result<Tensor> {
    for_real!(x, T => {
        let shape = dims2(x)?;
        let dx = gradient::<T>(&values(dy)?, &values(x)?, &values(weight)?, &values(rho)?);
        tensor(dx, shape)
    })
}

fn inverse_rms<T: Real>(x: &[T], d: usize, epsilon: f64) -> Vec<T> {
    let mean = |row: &[T]| sum_of(d, |i| row[i] * row[i]) / T::of(d as f64);
    x.par_chunks(d).map(|row| (mean(row) + T::of(epsilon)).sqrt().recip()).collect()
}

fn scaled<T: Real>(x: &[T], weight: &[T], rho: &[T]) -> Vec<T> {
    let d = weight.len();
    let mut y = vec![T::of(0.0); x.len()];
    y.par_chunks_mut(d).zip(x.par_chunks(d)).zip(rho).for_each(|((y, x), &rho)| {
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * rho * w;
        }
    });
    y
}

fn gradient<T: Real>(dy: &[T], x: &[T], weight: &[T], rho: &[T]) -> Vec<T> {
    let d = weight.len();
    let mut dx = vec![T::of(0.0); x.len()];
    let rows = dx.par_chunks_mut(d).zip(x.par_chunks(d)).zip(dy.par_chunks(d)).zip(rho);
    rows.for_each(|(((dx, x), dy), &rho)| {
        for ((dx, &dy), &w) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = dy * w;
        }
        let along = dot(dx, x) * rho * rho * rho / T::of(d as f64);
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = *dx * rho - x * along;
        }
    });
    dx
}
