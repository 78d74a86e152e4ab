//! What the tests of the ops share: random inputs, finite differences, and the composed forms forced.

use std::cell::Cell;

use candle_core::{Device, Result, Shape, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the composed forms are asked for.
pub(super) fn composed_only() -> bool {
    COMPOSED.get()
}

/// Runs `f` with every op in its composed form.
pub(crate) fn composed<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    COMPOSED.set(true);
    let result = f();
    COMPOSED.set(false);
    result
}

/// Standard normal f64 values (Box-Muller), the same for the same seed.
pub(crate) fn normal(seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || super::uniform(rng.next_u64());
    let values: Vec<f64> = (0..shape.elem_count())
        .map(|_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The largest difference over the largest value of the second.
pub(crate) fn relative_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(candle_core::DType::F64)?, b.to_dtype(candle_core::DType::F64)?);
    let difference = (&a - &b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    let size = b.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    Ok(if difference == 0.0 { 0.0 } else { difference / size })
}

/// Requires two tensors to agree to `tolerance`, relative to the largest value.
pub(crate) fn close(a: &Tensor, b: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(a.dims(), b.dims());
    let difference = relative_difference(a, b)?;
    assert!(difference <= tolerance, "differ by {difference:e} relative, over {tolerance:e}");
    Ok(())
}

/// Requires `gradient` to be the gradient of the scalar `f` at `at` (f64), by central differences in every element.
///
/// A step of 1e-5 leaves a truncation error of about 1e-10 and a rounding error of about 1e-11 for values near one,
/// so 1e-7 of the largest gradient is a hundred times more than a right gradient shows and far less than a wrong
/// sign, factor or index does.
pub(crate) fn finite_difference(at: &Tensor, gradient: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let step = 1e-5;
    let values = at.flatten_all()?.to_vec1::<f64>()?;
    let mut numeric = Vec::with_capacity(values.len());
    for i in 0..values.len() {
        let moved = |by: f64| {
            let mut values = values.clone();
            values[i] += by;
            f(&Tensor::from_vec(values, at.shape(), &Device::Cpu)?)?.to_scalar::<f64>()
        };
        numeric.push((moved(step)? - moved(-step)?) / (2.0 * step));
    }
    close(gradient, &Tensor::from_vec(numeric, at.shape(), &Device::Cpu)?, 1e-7)
}
