//! Products of a few rows with a matrix, as a step of generation has them: what they take is the time to read the matrix,
//! once.
//!
//! Each result is a sum in one order, whatever other rows there are: what is generated does not depend on what else is
//! generated beside it.

use rayon::prelude::*;

use super::weight::{Rows, Scratch};
use super::{Real, vectorised};

/// The most rows. From here on a product in blocks is faster.
pub(crate) const FEW: usize = 16;
/// Rows of the matrix that one task takes.
const TASK: usize = 32;
/// Rows of `x` that are multiplied together, while a row of the matrix is at hand.
const TOGETHER: usize = 4;
/// Partial sums of one result.
const LANES: usize = 16;

/// Adds `scale · x Wᵀ` to `y [T, out]`, for `W [out, in]` and the rows of `x [T, in]`.
pub(crate) fn add<T: Real>(y: &mut [T], scale: f64, x: &[&[T]], weight: &Rows<'_, T>, outputs: usize) {
    let count = x.len();
    if count == 0 || outputs == 0 {
        return;
    }
    // transposed, so that a task writes one place
    let mut product = vec![T::of(0.0); outputs * count];
    product.par_chunks_mut(TASK * count).enumerate().for_each_init(Scratch::new, |scratch, (task, product)| {
        for (i, product) in product.chunks_exact_mut(count).enumerate() {
            let row = weight.row(task * TASK + i, scratch);
            vectorised(
                #[inline(always)]
                || {
                    let mut groups = product.chunks_exact_mut(TOGETHER).zip(x.chunks_exact(TOGETHER));
                    for (product, x) in &mut groups {
                        let x: [&[T]; TOGETHER] = std::array::from_fn(|i| x[i]);
                        product.copy_from_slice(&dots(row, x));
                    }
                    let whole = count / TOGETHER * TOGETHER;
                    for (product, x) in product[whole..].iter_mut().zip(&x[whole..]) {
                        [*product] = dots(row, [*x]);
                    }
                },
            );
        }
    });
    let scale = T::of(scale);
    for (output, product) in product.chunks_exact(count).enumerate() {
        for (row, &value) in product.iter().enumerate() {
            y[row * outputs + output] += scale * value;
        }
    }
}

/// `Σ w_i x_i` of several rows, each in the same order.
#[inline(always)]
fn dots<T: Real, const N: usize>(w: &[T], x: [&[T]; N]) -> [T; N] {
    let x = x.map(|x| &x[..w.len()]);
    let mut lanes = [[T::of(0.0); LANES]; N];
    let whole = w.len() / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lanes, x) in lanes.iter_mut().zip(&x) {
            for (lane, sum) in lanes.iter_mut().enumerate() {
                *sum += w[start + lane] * x[start + lane];
            }
        }
    }
    std::array::from_fn(|i| {
        let mut total = T::of(0.0);
        for &sum in &lanes[i] {
            total += sum;
        }
        for j in whole..w.len() {
            total += w[j] * x[i][j];
        }
        total
    })
}

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
