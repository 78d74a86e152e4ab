//! Products of a few rows with a matrix, as a step of generation has them: what they take is the time to read the matrix,
//! once.
//!
//! Each result is a sum in one order, whatever other rows there are: what is generated does not depend on what else is
//! generated beside it.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::Real;
use super::weight::{Rows, Scratch};

/// The most rows. From here on a product in blocks is faster.
pub(crate) const FEW: usize = 16;
/// Rows of the matrix that one task takes.
const TASK: usize = 32;
/// Rows of `x`, and rows of the matrix, that are multiplied together: their sums stay in registers, and each vector that is
/// read serves several of them.
const X: usize = 4;
const W: usize = 2;

/// Adds `scale · x Wᵀ` to `y [T, out]`, for `W [out, in]` and the rows of `x [T, in]`.
pub(crate) fn add<T: Real>(y: &mut [T], scale: f64, x: &[&[T]], weight: &Rows<'_, T>, outputs: usize) {
    let count = x.len();
    if count == 0 || outputs == 0 {
        return;
    }
    // transposed, so that a task writes one place
    let mut product = vec![T::of(0.0); outputs * count];
    let new = || [Scratch::new(), Scratch::new()];
    product.par_chunks_mut(TASK * count).enumerate().for_each_init(new, |scratch, (task, product)| {
        pulp::Arch::new().dispatch(Task { product, first: task * TASK, x, weight, scratch });
    });
    let scale = T::of(scale);
    for (output, product) in product.chunks_exact(count).enumerate() {
        for (row, &value) in product.iter().enumerate() {
            y[row * outputs + output] += scale * value;
        }
    }
}

/// Some rows of the matrix with all of `x`.
struct Task<'t, T> {
    /// `[rows, T]`
    product: &'t mut [T],
    /// The first of the rows.
    first: usize,
    x: &'t [&'t [T]],
    weight: &'t Rows<'t, T>,
    scratch: &'t mut [Scratch<T>; W],
}

impl<T: Real> WithSimd for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { product, mut first, x, weight, scratch } = self;
        let count = x.len();
        for product in product.chunks_mut(W * count) {
            match product.len() == W * count {
                true => {
                    let [one, two] = scratch;
                    several(simd, [weight.row(first, one), weight.row(first + 1, two)], x, product);
                }
                false => several(simd, [weight.row(first, &mut scratch[0])], x, product),
            }
            first += W;
        }
    }
}

/// The products of `N` rows of the matrix with all of `x`. `[N, T]`
#[inline(always)]
fn several<T: Real, S: Simd, const N: usize>(simd: S, w: [&[T]; N], x: &[&[T]], product: &mut [T]) {
    let count = x.len();
    let (groups, rest) = x.as_chunks::<X>();
    for (group, x) in groups.iter().enumerate() {
        let dots = T::dots(simd, w, *x);
        for i in 0..X {
            for j in 0..N {
                product[j * count + group * X + i] = dots[i][j];
            }
        }
    }
    for (i, x) in rest.iter().enumerate() {
        let [dots] = T::dots(simd, w, [*x]);
        for j in 0..N {
            product[j * count + groups.len() * X + i] = dots[j];
        }
    }
}

/// `Real::dots`. Loops and no closures: a closure that is not inlined is compiled for the smallest registers.
macro_rules! dots {
    ($split:ident, $splat:ident, $mul_add:ident, $reduce:ident) => {
        #[inline(always)]
        fn dots<S: pulp::Simd, const W: usize, const X: usize>(
            simd: S,
            w: [&[Self]; W],
            x: [&[Self]; X],
        ) -> [[Self; W]; X] {
            let (mut w_whole, mut w_rest) = ([S::$split(&[]).0; W], w);
            let (mut x_whole, mut x_rest) = ([S::$split(&[]).0; X], x);
            for j in 0..W {
                (w_whole[j], w_rest[j]) = S::$split(w[j]);
            }
            let len = w_whole[0].len();
            for i in 0..X {
                (x_whole[i], x_rest[i]) = S::$split(x[i]);
                x_whole[i] = &x_whole[i][..len];
            }
            for j in 0..W {
                w_whole[j] = &w_whole[j][..len];
            }
            let mut sums = [[simd.$splat(0.0); W]; X];
            for at in 0..len {
                for i in 0..X {
                    for j in 0..W {
                        sums[i][j] = simd.$mul_add(w_whole[j][at], x_whole[i][at], sums[i][j]);
                    }
                }
            }
            let mut dots = [[0.0; W]; X];
            for i in 0..X {
                for j in 0..W {
                    dots[i][j] = simd.$reduce(sums[i][j]);
                    for at in 0..w_rest[j].len() {
                        dots[i][j] += w_rest[j][at] * x_rest[i][at];
                    }
                }
            }
            dots
        }
    };
}
pub(super) use dots;

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::quant::{Quant, Weight};

    #[test]
    fn a_row_is_multiplied_as_if_it_were_alone_and_right() {
        let (outputs, inputs) = (70, 96);
        let value = |i: usize| ((i * i * 7 + 3 * i) % 23) as f32 / 11.0 - 1.0;
        let w: Vec<f32> = (0..outputs * inputs).map(value).collect();
        for kept in [Quant::None.of_linear(inputs), Quant::Q8_0.of_linear(inputs), Quant::Bf16.of_linear(inputs)] {
            let weight: Weight = kept.keep(outputs, inputs, w.clone()).expect("kept");
            let rows = Rows::<f32>::of(&weight).expect("rows");
            let dense = weight.dense(candle_core::DType::F32).expect("dense");
            for count in [1, 3, 4, 7, FEW] {
                let x: Vec<f32> = (0..count * inputs).map(|i| value(i + 5)).collect();
                let each: Vec<&[f32]> = x.chunks_exact(inputs).collect();
                let mut y = vec![0.5; count * outputs];
                add(&mut y, 2.0, &each, &rows, outputs);
                let expected = Tensor::from_slice(&x, (count, inputs), &Device::Cpu)
                    .and_then(|x| ((x.matmul(&dense.t()?)? * 2.0)? + 0.5)?.flatten_all()?.to_vec1::<f32>())
                    .expect("multiplied");
                // sums of a hundred products of ones
                assert!(y.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3));
                for (row, x) in each.iter().enumerate() {
                    let mut alone = vec![0.5; outputs];
                    add(&mut alone, 2.0, &[x], &rows, outputs);
                    assert_eq!(&y[row * outputs..][..outputs], alone, "row {row} of {count}");
                }
            }
        }
    }
}
