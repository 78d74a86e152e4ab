//! Rotary position embedding over rows.

use candle_core::{Result, Tensor};

use super::{Real, filled, for_real, tensor, values, vectorised};
use crate::ops::{dims2, rope::Turn};

pub(crate) fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, turn: Turn) -> Result<Tensor> {
    let (rows, width) = dims2(x)?;
    let (angles, half) = dims2(cos)?;
    if rows != angles || half == 0 || width % (2 * half) != 0 {
        candle_core::bail!("rope: rows of {width}, {rows} of them, angles {angles}x{half}")
    }
    for_real!(x, T => {
        let sign = T::of(if turn == Turn::Forward { 1.0 } else { -1.0 });
        let turned = turned::<T>(&values(x)?, width, &values(cos)?, &values(sin)?, half, sign);
        tensor(turned, (rows, width))
    })
}

fn turned<T: Real>(x: &[T], width: usize, cos: &[T], sin: &[T], half: usize, sign: T) -> Vec<T> {
    let [y] = filled(x.len(), width, |row, [y]| {
        let x = &x[row * width..][..width];
        let [cos, sin] = [cos, sin].map(|of| &of[row * half..][..half]);
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    let (y1, y2) = y.split_at_mut(half);
                    let (x1, x2) = x.split_at(half);
                    for j in 0..half {
                        let sin = sign * sin[j];
                        y1[j] = x1[j] * cos[j] - x2[j] * sin;
                        y2[j] = x2[j] * cos[j] + x1[j] * sin;
                    }
                }
            },
        );
    });
    y
}
