//! Block types of GGUF files. The arithmetic is candle's, block by block as llama.cpp has it.

use std::fmt;

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType,
};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::ops::vectorised;

/// How a matrix is stored in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "GGUF's own names")]
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockType {
    /// All of them, with their number in a file and their name.
    pub const ALL: [(u32, &str, Self); 13] = [
        (0, "F32", Self::F32),
        (1, "F16", Self::F16),
        (30, "BF16", Self::BF16),
        (2, "Q4_0", Self::Q4_0),
        (3, "Q4_1", Self::Q4_1),
        (6, "Q5_0", Self::Q5_0),
        (7, "Q5_1", Self::Q5_1),
        (8, "Q8_0", Self::Q8_0),
        (10, "Q2_K", Self::Q2K),
        (11, "Q3_K", Self::Q3K),
        (12, "Q4_K", Self::Q4K),
        (13, "Q5_K", Self::Q5K),
        (14, "Q6_K", Self::Q6K),
    ];

    /// Its number in a file.
    #[must_use]
    pub fn number(self) -> u32 {
        Self::ALL.iter().find(|(_, _, kind)| *kind == self).map_or(0, |(number, _, _)| *number)
    }

    /// Elements of a block.
    #[must_use]
    pub fn block_size(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => size_of::<BlockQ4_0>(),
            Self::Q4_1 => size_of::<BlockQ4_1>(),
            Self::Q5_0 => size_of::<BlockQ5_0>(),
            Self::Q5_1 => size_of::<BlockQ5_1>(),
            Self::Q8_0 => size_of::<BlockQ8_0>(),
            Self::Q2K => size_of::<BlockQ2K>(),
            Self::Q3K => size_of::<BlockQ3K>(),
            Self::Q4K => size_of::<BlockQ4K>(),
            Self::Q5K => size_of::<BlockQ5K>(),
            Self::Q6K => size_of::<BlockQ6K>(),
        }
    }

    /// Bytes of a row; none where it is no whole number of blocks, or too long.
    #[must_use]
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        columns
            .is_multiple_of(self.block_size())
            .then(|| (columns / self.block_size()).checked_mul(self.block_bytes()))?
    }

    /// Whether the blocks can be read where `bytes` begin.
    pub(super) fn is_aligned(self, bytes: &[u8]) -> bool {
        (bytes.as_ptr() as usize).is_multiple_of(if self == Self::F32 { 4 } else { 2 })
    }

    /// The values of whole blocks.
    pub(super) fn dequantize(self, bytes: &[u8], values: &mut [f32]) {
        fn through<B: GgmlType>(bytes: &[u8], values: &mut [f32]) {
            B::to_float(blocks::<B>(bytes), values);
        }
        match self {
            Self::F32 => values.copy_from_slice(blocks(bytes)),
            Self::F16 => blocks::<f16>(bytes).convert_to_f32_slice(values),
            Self::BF16 => widened(blocks(bytes), values),
            Self::Q4_0 => through::<BlockQ4_0>(bytes, values),
            Self::Q4_1 => through::<BlockQ4_1>(bytes, values),
            Self::Q5_0 => through::<BlockQ5_0>(bytes, values),
            Self::Q5_1 => through::<BlockQ5_1>(bytes, values),
            Self::Q8_0 => of_eight_bits(bytes, values),
            Self::Q2K => through::<BlockQ2K>(bytes, values),
            Self::Q3K => through::<BlockQ3K>(bytes, values),
            Self::Q4K => through::<BlockQ4K>(bytes, values),
            Self::Q5K => through::<BlockQ5K>(bytes, values),
            Self::Q6K => through::<BlockQ6K>(bytes, values),
        }
    }

    /// Quantizes `values`, whole blocks of them, in parallel.
    #[must_use]
    pub fn quantize(self, values: &[f32]) -> Vec<u8> {
        fn through<B: GgmlType>(values: &[f32], bytes: &mut [u8]) {
            let mut quantized = vec![B::zeros(); values.len() / B::BLCK_SIZE];
            B::from_float(values, &mut quantized);
            bytes.copy_from_slice(as_bytes(&quantized));
        }
        // so many elements a task: whole blocks of every type
        const TASK: usize = 1 << 14;
        let mut bytes = vec![0; values.len() / self.block_size() * self.block_bytes()];
        let of_task = TASK / self.block_size() * self.block_bytes();
        bytes.par_chunks_mut(of_task).zip(values.par_chunks(TASK)).for_each(|(bytes, values)| match self {
            Self::F32 => bytes.copy_from_slice(as_bytes(values)),
            Self::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytes.copy_from_slice(as_bytes(&halves));
            }
            Self::BF16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytes.copy_from_slice(as_bytes(&halves));
            }
            Self::Q4_0 => through::<BlockQ4_0>(values, bytes),
            Self::Q4_1 => through::<BlockQ4_1>(values, bytes),
            Self::Q5_0 => through::<BlockQ5_0>(values, bytes),
            Self::Q5_1 => through::<BlockQ5_1>(values, bytes),
            Self::Q8_0 => through::<BlockQ8_0>(values, bytes),
            Self::Q2K => through::<BlockQ2K>(values, bytes),
            Self::Q3K => through::<BlockQ3K>(values, bytes),
            Self::Q4K => through::<BlockQ4K>(values, bytes),
            Self::Q5K => through::<BlockQ5K>(values, bytes),
            Self::Q6K => through::<BlockQ6K>(values, bytes),
        });
        bytes
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, _, kind)| kind == self).map_or("", |(_, name, _)| name);
        f.write_str(name)
    }
}

/// bf16 is the upper half of f32.
fn widened(halves: &[bf16], values: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (value, half) in values.iter_mut().zip(halves) {
                *value = f32::from_bits(u32::from(half.to_bits()) << 16);
            }
        },
    );
}

/// Q8_0: a scale in f16, then 32 whole numbers. The arithmetic is candle's, in the machine's widest registers.
fn of_eight_bits(bytes: &[u8], values: &mut [f32]) {
    const BLOCK: usize = 32;
    let (blocks, _) = bytes.as_chunks::<{ 2 + BLOCK }>();
    let (values, _) = values.as_chunks_mut::<BLOCK>();
    vectorised(
        #[inline(always)]
        || {
            for (block, values) in blocks.iter().zip(values) {
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                // by itself, since the compiler cannot know that `block` is no part of `values`
                let mut scaled = [0.0; BLOCK];
                for i in 0..BLOCK {
                    scaled[i] = f32::from(block[2 + i].cast_signed()) * scale;
                }
                *values = scaled;
            }
        },
    );
}

/// Bytes as the numbers or blocks in them. GGUF is little-endian, and so are the machines that this runs on.
fn blocks<B>(bytes: &[u8]) -> &[B] {
    // SAFETY: only called with B a number or a struct of numbers without padding, for which any bytes are a value;
    // align_to leaves out what is not aligned, and the check below ends it where that is not nothing.
    #[expect(unsafe_code, reason = "blocks are read where they lie in the file")]
    let (before, blocks, after) = unsafe { bytes.align_to::<B>() };
    assert!(before.is_empty() && after.is_empty(), "blocks are aligned and whole, as was checked at the start");
    blocks
}

fn as_bytes<B>(blocks: &[B]) -> &[u8] {
    // SAFETY: as above; a number's bytes are bytes.
    #[expect(unsafe_code, reason = "blocks are written as they lie in memory")]
    unsafe {
        std::slice::from_raw_parts(blocks.as_ptr().cast(), size_of_val(blocks))
    }
}

#[cfg(target_endian = "big")]
compile_error!("model files are read as little-endian");
