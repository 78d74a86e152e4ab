//! Rows of a matrix: taken out, and added back.

use candle_core::{Result, Tensor};

use super::cpu::{filled, for_real, tensor, values};
use super::{dims2, has_kernel};

/// Rows `rows` of `x [T, D]`, in that order; a row may be taken more than once.
///
/// # Errors
/// A row that `x` does not have.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let (total, d) = checked(x, rows)?;
    if has_kernel(x) && d > 0 {
        return for_real!(x, T => {
            let x = values::<T>(x)?;
            let [taken] = filled::<T, 1>(rows.len() * d, d, |i, [row]| {
                row.copy_from_slice(&x[rows[i] as usize * d..][..d]);
            });
            tensor(taken, (rows.len(), d))
        });
    }
    debug_assert!(rows.iter().all(|&row| (row as usize) < total));
    x.index_select(&Tensor::new(rows, x.device())?, 0)
}

/// `onto [T, D]` with row `i` of `x` added to its row `rows[i]`: the gradient of [`gather`].
///
/// # Errors
/// A row that `onto` does not have, or another number of rows or columns.
pub fn scatter_add(onto: &Tensor, rows: &[u32], x: &Tensor) -> Result<Tensor> {
    let (_, d) = checked(onto, rows)?;
    if dims2(x)? != (rows.len(), d) {
        candle_core::bail!("scatter: {:?} onto {} rows of {d}", x.shape(), rows.len())
    }
    if has_kernel(x) && d > 0 {
        return for_real!(x, T => {
            let (shape, onto, x) = (dims2(onto)?, values::<T>(onto)?, values::<T>(x)?);
            let [mut sum] = filled::<T, 1>(onto.len(), d, |i, [row]| row.copy_from_slice(&onto[i * d..][..d]));
            for (&row, x) in rows.iter().zip(x.chunks_exact(d)) {
                for (sum, &x) in sum[row as usize * d..][..d].iter_mut().zip(x) {
                    *sum += x;
                }
            }
            tensor(sum, shape)
        });
    }
    #[cfg(feature = "cuda")]
    if super::on_gpu(x) && d > 0 && !rows.is_empty() && x.dtype() == onto.dtype() {
        return super::cuda::rows::scatter_add(onto, rows, x);
    }
    onto.index_add(&Tensor::new(rows, x.device())?, x, 0)
}

fn checked(x: &Tensor, rows: &[u32]) -> Result<(usize, usize)> {
    let (total, d) = dims2(x)?;
    match rows.iter().find(|&&row| row as usize >= total) {
        Some(row) => candle_core::bail!("row {row} of a matrix of {total} rows"),
        None => Ok((total, d)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, composed, finite_difference, normal};

    #[test]
    fn scattering_is_the_gradient_of_gathering() -> Result<()> {
        let (x, dy, rows) = (normal(1, (4, 3))?, normal(2, (5, 3))?, [3, 0, 3, 1, 0]);
        let dx = scatter_add(&x.zeros_like()?, &rows, &dy)?;
        finite_difference(&x, &dx, |x| (gather(x, &rows)? * &dy)?.sum_all())
    }

    #[test]
    fn kernel_equals_composed_form() -> Result<()> {
        let (x, onto, rows) = (normal(1, (5, 3))?, normal(2, (4, 3))?, [3, 0, 3, 1, 0]);
        let both = || Ok([gather(&onto, &rows)?, scatter_add(&onto, &rows, &x)?]);
        both()?.iter().zip(&composed(both)?).try_for_each(|(kernel, plain)| close(kernel, plain, 1e-15))
    }

    #[test]
    fn a_row_that_is_not_there_is_an_error() -> Result<()> {
        let x = normal(1, (4, 3))?;
        assert!(gather(&x, &[4]).expect_err("there are four").to_string().contains("row 4"));
        assert!(scatter_add(&x, &[7], &normal(2, (1, 3))?).is_err());
        assert!(scatter_add(&x, &[1], &normal(2, (2, 3))?).is_err());
        Ok(())
    }
}
