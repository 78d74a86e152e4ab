//! Decompositions of matrices: the largest singular values of a frozen matrix, and those of a product of two thin ones.

use candle_core::{Device, Result, Tensor};
use nalgebra::DMatrix;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// Columns that the subspace has more than are asked for, and the times it is turned towards the matrix (Halko, Martinsson
/// & Tropp 2011, <https://arxiv.org/abs/0909.4061>); twice the turns of PEFT's `pissa_niter_16` are not needed for the
/// approximation to be within a thousandth of the best one.
const SPARE: usize = 10;
const TURNS: usize = 16;

/// `X ≈ U diag(S) Vᵀ`, f32.
#[derive(Debug)]
pub(super) struct Svd {
    /// `[rows, R]`
    pub(super) u: Tensor,
    /// `[R]`, falling.
    pub(super) s: Tensor,
    /// `[columns, R]`
    pub(super) v: Tensor,
}

/// A draw of the standard normal distribution.
pub(super) fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / f64::from(u32::MAX) / (1.0 + f64::EPSILON);
    let (one, two) = (uniform().min(1.0), uniform());
    (-2.0 * one.ln()).sqrt() * (std::f64::consts::TAU * two).cos()
}

/// The largest `rank` singular values of `x [rows, columns]`, f32, and their vectors.
///
/// # Errors
/// What candle returns.
pub(super) fn largest(x: &Tensor, rank: usize, rng: &mut ChaCha8Rng) -> Result<Svd> {
    let (rows, columns) = x.dims2()?;
    let wide = (rank + SPARE).min(rows).min(columns);
    let start: Vec<f32> = (0..columns * wide).map(|_| normal(rng) as f32).collect();
    let mut q = orthonormal(&x.matmul(&Tensor::from_vec(start, (columns, wide), x.device())?)?)?;
    let xt = x.t()?;
    for _ in 0..TURNS {
        q = orthonormal(&x.matmul(&orthonormal(&xt.matmul(&q)?)?)?)?;
    }
    // X ≈ Q Qᵀ X, of which the second product is small
    of_product(&q, &xt.matmul(&q)?, rank)
}

/// The largest `rank` singular values of `left rightᵀ`, where both are thin: `[rows, k]` and `[columns, k]`.
///
/// # Errors
/// What candle returns.
pub(super) fn of_product(left: &Tensor, right: &Tensor, rank: usize) -> Result<Svd> {
    let [(left_q, left_r), (right_q, right_r)] = [qr(left)?, qr(right)?];
    let svd = (left_r * right_r.transpose()).svd(true, true);
    let (Some(u), Some(vt)) = (svd.u, svd.v_t) else { candle_core::bail!("no singular vectors were computed") };
    let rank = rank.min(svd.singular_values.len());
    let s: Vec<f32> = svd.singular_values.iter().take(rank).map(|&s| s as f32).collect();
    let u = left_q * u.columns(0, rank);
    let v = right_q * vt.rows(0, rank).transpose();
    Ok(Svd { u: tensor(&u)?, s: Tensor::new(s, &Device::Cpu)?, v: tensor(&v)? })
}

/// Orthonormal columns that span those of `x [rows, k]`, `k` at most the rows.
///
/// # Errors
/// What candle returns.
pub(super) fn orthonormal(x: &Tensor) -> Result<Tensor> {
    tensor(&qr(x)?.0)
}

fn qr(x: &Tensor) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    let (rows, columns) = x.dims2()?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let matrix = DMatrix::from_row_iterator(rows, columns, values.into_iter().map(f64::from));
    Ok(matrix.qr().unpack())
}

fn tensor(matrix: &DMatrix<f64>) -> Result<Tensor> {
    let values: Vec<f32> =
        matrix.row_iter().flat_map(|row| row.iter().map(|&x| x as f32).collect::<Vec<_>>()).collect();
    Tensor::from_vec(values, (matrix.nrows(), matrix.ncols()), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..rows * columns).map(|_| normal(&mut rng) as f32).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("made")
    }

    fn distance(one: &Tensor, two: &Tensor) -> f32 {
        let square = (one - two).and_then(|d| d.sqr()).and_then(|d| d.sum_all()).expect("of one shape");
        square.to_scalar::<f32>().expect("a number").sqrt()
    }

    #[test]
    fn a_product_of_thin_matrices_is_decomposed_exactly() {
        let (left, right) = (random(40, 6, 1), random(30, 6, 2));
        let product = left.matmul(&right.t().expect("turned")).expect("multiplied");
        let Svd { u, s, v } = of_product(&left, &right, 6).expect("decomposed");
        let again = u.broadcast_mul(&s).and_then(|us| us.matmul(&v.t()?)).expect("multiplied");
        // norms about 14; f32 holds seven digits
        assert!(distance(&product, &again) < 1e-4);
        let s = s.to_vec1::<f32>().expect("f32");
        assert!(s.is_sorted_by(|a, b| a >= b));
        // cut at 4, the error is what the left-out values say (Eckart & Young)
        let Svd { u, s: kept, v } = of_product(&left, &right, 4).expect("decomposed");
        let cut = u.broadcast_mul(&kept).and_then(|us| us.matmul(&v.t()?)).expect("multiplied");
        assert!((distance(&product, &cut) - (s[4] * s[4] + s[5] * s[5]).sqrt()).abs() < 1e-4);
    }

    #[test]
    fn the_largest_singular_values_are_those_of_the_full_decomposition() {
        let x = random(60, 50, 3);
        let full = of_product(&x, &Tensor::eye(50, candle_core::DType::F32, &Device::Cpu).expect("made"), 50)
            .and_then(|svd| svd.s.to_vec1::<f32>())
            .expect("decomposed");
        let part = largest(&x, 8, &mut ChaCha8Rng::seed_from_u64(4)).expect("decomposed");
        for (full, part) in full.iter().zip(part.s.to_vec1::<f32>().expect("f32")) {
            // a random matrix is the worst case: its singular values lie close together
            assert!((full - part).abs() < 1e-3 * full, "{full} {part}");
        }
    }
}
