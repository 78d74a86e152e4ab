//! Quantized matrices against gguf and bitsandbytes: `fixtures/quant`, made by `scripts/make_quant_fixtures.py`.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use dpo_lora::quant::ggml::BlockType;
use dpo_lora::quant::nf4::{Nf4, Scales};
use dpo_lora::quant::{Bytes, Kept, Quant, Quantized, Weight};
use dpo_lora::tensor_file::TensorFile;
use proptest::prelude::*;

fn file(name: &str) -> TensorFile {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quant");
    TensorFile::open(&folder.join(name)).expect("the fixture is there")
}

fn values(file: &TensorFile, name: &str) -> Vec<f32> {
    let shape = file.shape(name).expect("it is there").to_vec();
    file.read_f32(name, &shape).expect("numbers")
}

fn bytes(file: &TensorFile, name: &str) -> Vec<u8> {
    file.bytes(name).expect("bytes").to_vec()
}

fn dense(weight: Quantized) -> Vec<f32> {
    Weight::Quantized(weight).dense(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("f32")
}

/// gguf multiplies in another order here and there: half a unit in the last place of each product.
#[test]
fn blocks_hold_what_gguf_reads_in_them() {
    let file = file("blocks.safetensors");
    for (_, name, kind) in BlockType::ALL.into_iter().filter(|(_, name, _)| *name != "F32") {
        let expected = values(&file, &format!("{name}.values"));
        let [rows, columns] = file.shape(&format!("{name}.values")).expect("there")[..] else { panic!("a matrix") };
        let packed = Bytes::Owned(Arc::new(bytes(&file, &format!("{name}.bytes"))));
        let found = dense(Quantized::ggml(rows, columns, kind, packed).expect("whole blocks"));
        let largest = expected.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        assert!(largest > 0.1);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 2e-7 * largest, "{name}: {found} {expected}");
        }
    }
}

#[test]
fn nf4_is_bitsandbytes_to_the_bit() {
    let file = file("nf4.safetensors");
    let weight = values(&file, "weight");
    let ours = Nf4::quantize(&weight);
    let state: serde_json::Value =
        serde_json::from_slice(&bytes(&file, "state.quant_state.bitsandbytes__nf4")).expect("JSON");
    let offset = state["nested_offset"].as_f64().expect("a number") as f32;
    let scales = Scales::Nested {
        quantized: bytes(&file, "state.absmax"),
        code: values(&file, "state.nested_quant_map"),
        scales: values(&file, "state.nested_absmax"),
        offset,
    };
    let theirs = Nf4::new(bytes(&file, "packed"), weight.len(), scales).expect("they belong together");
    let nested = |nf4: &Nf4| match nf4.scales() {
        Scales::Nested { quantized, code, scales, offset } => {
            (quantized.clone(), code.clone(), scales.clone(), *offset)
        }
        Scales::Plain(_) => panic!("double quantization"),
    };
    let (a, b) = (nested(&ours), nested(&theirs));
    assert_eq!(a.1, b.1, "the 256 values");
    // torch adds the scales up in another order
    assert!((a.3 - b.3).abs() <= 2e-7 * b.3, "{} {}", a.3, b.3);
    for (a, b) in a.2.iter().zip(&b.2) {
        assert!((a - b).abs() <= 2e-7 * b.abs().max(1.0), "{a} {b}");
    }
    for (block, (&found, &expected)) in a.0.iter().zip(&b.0).enumerate() {
        // half-way between two, the last bit of the offset decides, and of bitsandbytes on a CPU its own rounding (1.4e-6 was seen)
        let scale = weight[64 * block..64 * (block + 1)].iter().fold(0.0, |largest: f32, w| largest.max(w.abs()));
        let value = (scale - b.3) / b.2[block / 256];
        let half_way = (b.1[found as usize] + b.1[expected as usize]) / 2.0;
        assert!(found == expected || (value - half_way).abs() < 1e-5, "scale {block}: {found} {expected} of {value}");
    }
    assert_eq!(ours.packed(), theirs.packed(), "the index of each element");
    assert_eq!(dense(Quantized::nf4(24, 832, theirs).expect("its size")), values(&file, "dequantized"));

    let plain = Nf4::new(bytes(&file, "plain.packed"), weight.len(), Scales::Plain(values(&file, "plain.absmax")));
    let plain = Quantized::nf4(24, 832, plain.expect("they belong together")).expect("its size");
    assert_eq!(dense(plain), values(&file, "plain.dequantized"));
}

/// What a type of so many bits loses of normal numbers, in the root mean square: measured of llama.cpp's, and a half more.
#[test]
fn quantizing_loses_no_more_than_the_bits_say() {
    let weight = values(&file("nf4.safetensors"), "weight");
    let size = (weight.iter().map(|w| w * w).sum::<f32>() / weight.len() as f32).sqrt();
    for (quant, most) in [
        (Quant::F16, 3e-4),
        (Quant::Bf16, 2.5e-3),
        (Quant::Q8_0, 8e-3),
        (Quant::Q6K, 0.03),
        (Quant::Q5K, 0.06),
        (Quant::Q5_0, 0.07),
        (Quant::Q4K, 0.12),
        (Quant::Q4_0, 0.14),
        (Quant::Nf4, 0.14),
        (Quant::Q3K, 0.25),
        (Quant::Q2K, 0.45),
    ] {
        // 832 columns are no whole blocks of 256: as rows of 256 they are
        let kept = quant.of_linear(256);
        let weight = &weight[..78 * 256];
        let Weight::Quantized(quantized) = kept.keep(78, 256, weight.to_vec()).expect("kept") else {
            panic!("{kept:?}")
        };
        assert_eq!(quantized.num_bytes(), kept.num_bytes(78, 256), "{quant:?}");
        let squares: f32 = dense(quantized).iter().zip(weight).map(|(a, b)| (a - b) * (a - b)).sum();
        let lost = (squares / weight.len() as f32).sqrt() / size;
        assert!(lost > most / 20.0 && lost < most, "{quant:?} loses {lost}");
    }
}

#[test]
fn every_name_of_a_recipe_is_one_of_serdes() {
    for (name, quant) in Quant::ALL {
        assert_eq!(serde_json::to_value(quant).expect("a string"), name);
        assert_eq!(quant.name(), name);
    }
}

#[test]
fn rows_that_hold_no_whole_blocks_fall_back_as_llama_cpp_does() {
    assert_eq!(Quant::Q4K.of_linear(576), Kept::Blocks(BlockType::Q5_0));
    assert_eq!(Quant::Q4K.of_linear(100), Kept::Blocks(BlockType::F16));
    assert_eq!(Quant::Q4K.of_embedding(512), Kept::Blocks(BlockType::Q6K));
    let bytes = |n: usize| Bytes::Owned(Arc::new(vec![0; n]));
    assert!(Quantized::ggml(1, 100, BlockType::Q8_0, bytes(106)).is_err());
    assert!(Quantized::ggml(2, 32, BlockType::Q8_0, bytes(67)).is_err());
    assert!(Quantized::ggml(usize::MAX, 1 << 40, BlockType::Q8_0, bytes(34)).is_err());
}

proptest! {
    /// Any row, range or choice of rows gives the values of the whole matrix.
    #[test]
    fn a_part_is_the_part_of_the_whole(seed in 0u64..1000, rows in 1usize..9, blocks in 1usize..3) {
        let columns = 32 * blocks + if seed % 2 == 0 { 0 } else { 3 };
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i as f32 + seed as f32) * 0.7).sin()).collect();
        let kinds = [Kept::Nf4, Quant::Q8_0.of_linear(columns), Kept::Dense];
        for kept in kinds {
            let weight = kept.keep(rows, columns, values.clone()).expect("kept");
            let whole = weight.dense(DType::F32).expect("dense").to_vec2::<f32>().expect("f32");
            let ids: Vec<u32> = (0..5).map(|i| (seed as u32 * 7 + i * 3) % rows as u32).collect();
            let some = weight.gather(&ids, DType::F32).expect("gathered").to_vec2::<f32>().expect("f32");
            for (id, row) in ids.iter().zip(some) {
                prop_assert_eq!(&row, &whole[*id as usize]);
            }
        }
    }
}
