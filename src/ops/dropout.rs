//! Dropout that can be repeated: whether an element is dropped depends on a key, its row's key and its column, and on
//! nothing else. Backward needs no saved mask, and a sequence meets the same dropout in whatever micro-batch it runs.

use candle_core::{Device, Result, Tensor};

/// Dropout of one adapter input.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// The share of elements dropped, `0 ≤ p < 1`.
    pub probability: f64,
    /// Names the place: seed, update and module.
    pub key: u64,
    /// Names each row: sequence and position.
    pub rows: &'a [u64],
}

/// SplitMix64's output function: neighbouring inputs give unrelated outputs.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A key for `name` under `key`.
#[must_use]
pub fn key(key: u64, name: u64) -> u64 {
    mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ mix(name.wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// `x [T, N]` with each element zeroed with `probability` and scaled by `1/(1 − probability)` otherwise. Linear in `x`
/// and diagonal, so it is its own backward.
///
/// # Errors
/// What candle returns for wrong shapes or types.
pub fn apply(x: &Tensor, dropout: &Dropout<'_>) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    if rows != dropout.rows.len() {
        candle_core::bail!("dropout: {rows} rows and {} row keys", dropout.rows.len())
    }
    let kept = (1.0 / (1.0 - dropout.probability)) as f32;
    let mut mask = vec![0f32; rows * columns];
    for (mask, &row) in mask.chunks_exact_mut(columns.max(1)).zip(dropout.rows) {
        let stream = key(dropout.key, row);
        for (column, mask) in mask.iter_mut().enumerate() {
            let uniform = super::uniform(mix(stream.wrapping_add(column as u64)));
            *mask = if uniform < dropout.probability { 0.0 } else { kept };
        }
    }
    x * Tensor::from_vec(mask, (rows, columns), &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_the_asked_share_and_keeps_the_mean() -> Result<()> {
        let rows: Vec<u64> = (0..200).collect();
        let x = Tensor::ones((200, 100), candle_core::DType::F64, &Device::Cpu)?;
        let y = apply(&x, &Dropout { probability: 0.3, key: 5, rows: &rows })?;
        let values = y.flatten_all()?.to_vec1::<f64>()?;
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64 / values.len() as f64;
        // 20,000 draws have a standard deviation of 0.0032
        assert!((dropped - 0.3).abs() < 0.013, "{dropped}");
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        Ok(())
    }

    #[test]
    fn a_row_is_dropped_alike_wherever_it_stands() -> Result<()> {
        let x = Tensor::ones((3, 50), candle_core::DType::F64, &Device::Cpu)?;
        let drop = |rows: &[u64]| apply(&x, &Dropout { probability: 0.5, key: 1, rows })?.to_vec2::<f64>();
        let (a, b) = (drop(&[10, 11, 12])?, drop(&[12, 10, 99])?);
        assert_eq!(a[0], b[1]);
        assert_eq!(a[2], b[0]);
        assert_ne!(a[0], a[1]);
        Ok(())
    }
}
