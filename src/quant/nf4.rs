//! NF4 with double quantization, value for value as bitsandbytes has it (Dettmers et al. 2023,
//! <https://arxiv.org/abs/2305.14314>).
//!
//! Sixty-four elements share a scale, the largest of their magnitudes, and each is the index of the nearest of sixteen
//! quantiles of the normal distribution. The scales, less their mean, are themselves quantized to eight bits, 256 of them
//! to a scale of their own.

use rayon::prelude::*;

/// Elements of a block.
pub const BLOCK: usize = 64;
/// Scales of a block of scales.
pub const NESTED_BLOCK: usize = 256;

/// NF4's sixteen values.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Half-way between neighbours of [`CODE`], as bitsandbytes writes them out: a value above one of them is nearer the upper.
const BETWEEN: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_41,
    -0.234_607_41,
    -0.137_911_73,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_8,
    0.389_312_53,
    0.501_663_4,
    0.642_786_9,
    0.861_478_42,
];

/// Bytes of so many elements.
#[must_use]
pub fn num_bytes(elements: usize) -> usize {
    let blocks = elements.div_ceil(BLOCK);
    elements.div_ceil(2) + blocks + 4 * (256 + blocks.div_ceil(NESTED_BLOCK))
}

/// A matrix in NF4, its elements one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4 {
    /// Two elements a byte, the first in the upper half.
    packed: Vec<u8>,
    len: usize,
    scales: Scales,
}

/// The scale of each block of elements.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// As they are.
    Plain(Vec<f32>),
    /// Quantized.
    Nested {
        /// Index into `code` of each scale.
        quantized: Vec<u8>,
        /// 256 values.
        code: Vec<f32>,
        /// Scale of each block of scales.
        scales: Vec<f32>,
        /// Added to every scale.
        offset: f32,
    },
}

impl Scales {
    fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { quantized, .. } => quantized.len(),
        }
    }

    #[inline]
    fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Nested { quantized, code, scales, offset } => {
                code[quantized[block] as usize] * scales[block / NESTED_BLOCK] + offset
            }
        }
    }
}

impl Nf4 {
    /// What a file holds.
    ///
    /// # Errors
    /// The parts do not belong together.
    pub fn new(packed: Vec<u8>, len: usize, scales: Scales) -> Result<Self, String> {
        let blocks = len.div_ceil(BLOCK);
        if packed.len() != len.div_ceil(2) {
            return Err(format!("{} bytes are not {len} elements of four bits", packed.len()));
        }
        if scales.len() != blocks {
            return Err(format!("{} scales are not those of {blocks} blocks", scales.len()));
        }
        if let Scales::Nested { code, scales, .. } = &scales
            && (code.len() != 256 || scales.len() != blocks.div_ceil(NESTED_BLOCK))
        {
            return Err(format!(
                "{} values and {} scales of scales are not 256 and one for every 256",
                code.len(),
                scales.len()
            ));
        }
        Ok(Self { packed, len, scales })
    }

    /// Quantizes a matrix, as `bitsandbytes` does with double quantization.
    #[must_use]
    pub fn quantize(values: &[f32]) -> Self {
        let blocks = values.len().div_ceil(BLOCK);
        let mut packed = vec![0; values.len().div_ceil(2)];
        let mut absolute = vec![0.0f32; blocks];
        let of_block = |((packed, values), scale): ((&mut [u8], &[f32]), &mut f32)| {
            *scale = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            let inverse = 1.0 / *scale;
            let index = |value: f32| BETWEEN.iter().filter(|&&between| value * inverse > between).count() as u8;
            for (packed, pair) in packed.iter_mut().zip(values.chunks(2)) {
                *packed = index(pair[0]) << 4 | pair.get(1).map_or(index(0.0), |&value| index(value));
            }
        };
        packed
            .par_chunks_mut(BLOCK / 2)
            .zip(values.par_chunks(BLOCK))
            .zip(absolute.par_iter_mut())
            .with_min_len(256)
            .for_each(of_block);
        let offset = mean(&absolute);
        absolute.iter_mut().for_each(|scale| *scale -= offset);
        let code = dynamic_code();
        let mut scales = Vec::with_capacity(blocks.div_ceil(NESTED_BLOCK));
        let mut quantized = Vec::with_capacity(blocks);
        for block in absolute.chunks(NESTED_BLOCK) {
            let largest = block.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            scales.push(largest);
            quantized.extend(block.iter().map(|&value| nearest(&code, value * (1.0 / largest))));
        }
        Self { packed, len: values.len(), scales: Scales::Nested { quantized, code, scales, offset } }
    }

    /// Two elements a byte.
    #[must_use]
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scale of each block.
    #[must_use]
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.packed.len()
            + match &self.scales {
                Scales::Plain(scales) => 4 * scales.len(),
                Scales::Nested { quantized, code, scales, .. } => quantized.len() + 4 * (code.len() + scales.len()),
            }
    }

    /// The elements from `start` on, as many as `values` has.
    pub(super) fn dequantize(&self, start: usize, values: &mut [f32]) {
        let mut at = start;
        let mut rest = values;
        while !rest.is_empty() {
            let scale = self.scales.get(at / BLOCK);
            let count = (BLOCK - at % BLOCK).min(rest.len());
            let (block, after) = rest.split_at_mut(count);
            if at.is_multiple_of(2) && count.is_multiple_of(2) {
                for (pair, &packed) in block.as_chunks_mut::<2>().0.iter_mut().zip(&self.packed[at / 2..]) {
                    *pair = [packed >> 4, packed & 15].map(|index| CODE[index as usize] * scale);
                }
            } else {
                for (i, value) in block.iter_mut().enumerate() {
                    let packed = self.packed[(at + i) / 2];
                    let index = if (at + i).is_multiple_of(2) { packed >> 4 } else { packed & 15 };
                    *value = CODE[index as usize] * scale;
                }
            }
            (at, rest) = (at + count, after);
        }
    }
}

/// The mean in f64, rounded once.
fn mean(values: &[f32]) -> f32 {
    (values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len().max(1) as f64) as f32
}

/// bitsandbytes' dynamic map of 256 values: signed, up to seven bits of exponent, the other bits linear between 0.1 and 1.
fn dynamic_code() -> Vec<f32> {
    const EXPONENT_BITS: i32 = 7;
    let mut code = vec![0.0f32, 1.0];
    for i in 0..EXPONENT_BITS {
        let steps: usize = 1 << i;
        // torch.linspace(0.1, 1, steps + 1) in f32, from both ends and by fused products, and the means of neighbours
        let boundary = |j: usize| {
            let step = (1.0f32 - 0.1f32) / steps as f32;
            if j < steps.div_ceil(2) { step.mul_add(j as f32, 0.1) } else { (-step).mul_add((steps - j) as f32, 1.0) }
        };
        let magnitude = 10f64.powi(i - (EXPONENT_BITS - 1)) as f32;
        for j in 0..steps {
            let value = magnitude * ((boundary(j) + boundary(j + 1)) / 2.0);
            code.extend([value, -value]);
        }
    }
    code.sort_unstable_by(f32::total_cmp);
    code
}

/// The index of the value of `code` nearest to `value`.
fn nearest(code: &[f32], value: f32) -> u8 {
    let above = code.partition_point(|&c| c < value).min(code.len() - 1);
    let below = above.saturating_sub(1);
    let index = if (value - code[below]).abs() <= (code[above] - value).abs() { below } else { above };
    index as u8
}
