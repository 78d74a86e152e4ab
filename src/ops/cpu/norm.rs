//! RMSNorm over rows.

use candle_core::{Result, Tensor};

use super::{Real, dot, filled, for_real, sum_of, tensor, values, vectorised};
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

pub(crate) fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rho: &Tensor,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    for_real!(x, T => {
        let shape = dims2(x)?;
        let onto = onto.map(values::<T>).transpose()?;
        let dx = gradient::<T>(&values(dy)?, &values(x)?, &values(weight)?, &values(rho)?, onto.as_deref());
        tensor(dx, shape)
    })
}

fn inverse_rms<T: Real>(x: &[T], d: usize, epsilon: f64) -> Vec<T> {
    let [rho] = filled(x.len() / d.max(1), 64, |chunk, [rho]| {
        for (i, rho) in rho.iter_mut().enumerate() {
            let row = &x[(chunk * 64 + i) * d..][..d];
            let squares = vectorised(
                #[inline(always)]
                || sum_of(d, |i| row[i] * row[i]),
            );
            *rho = (squares / T::of(d as f64) + T::of(epsilon)).sqrt().recip();
        }
    });
    rho
}

fn scaled<T: Real>(x: &[T], weight: &[T], rho: &[T]) -> Vec<T> {
    let d = weight.len();
    let [y] = filled(x.len(), d, |row, [y]| {
        let (x, rho) = (&x[row * d..][..d], rho[row]);
        vectorised(
            #[inline(always)]
            || {
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * rho * w;
                }
            },
        );
    });
    y
}

fn gradient<T: Real>(dy: &[T], x: &[T], weight: &[T], rho: &[T], onto: Option<&[T]>) -> Vec<T> {
    let d = weight.len();
    let [dx] = filled(x.len(), d, |row, [dx]| {
        let [x, dy] = [x, dy].map(|of| &of[row * d..][..d]);
        let onto = onto.map(|onto| &onto[row * d..][..d]);
        let rho = rho[row];
        vectorised(
            #[inline(always)]
            || {
                for ((dx, &dy), &w) in dx.iter_mut().zip(dy).zip(weight) {
                    *dx = dy * w;
                }
                let along = dot(dx, x) * rho * rho * rho / T::of(d as f64);
                for (dx, &x) in dx.iter_mut().zip(x) {
                    *dx = *dx * rho - x * along;
                }
                for (dx, &onto) in dx.iter_mut().zip(onto.unwrap_or_default()) {
                    *dx += onto;
                }
            },
        );
    });
    dx
}
