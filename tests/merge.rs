//! Merged is unmerged: for every family, every projection, every kind of base and of adapter, in memory and on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dpo_lora::adapter::{self, Adapters, LoraConfig, Targets, peft};
use dpo_lora::export::{Float, Merge, MergedFolder};
use dpo_lora::model::{Base, Decoder, DecoderConfig, Packed, Packer, PromptSpan, WeightFiles, family};
use dpo_lora::ops::completion_logps::{self, Want};
use dpo_lora::progress::Console;
use dpo_lora::quant::Quant;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Deserialize;

const MODELS: [&str; 11] =
    ["gqa", "tied", "llama3", "bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

fn config(name: &str, quant: Quant) -> DecoderConfig {
    family::read_config(&folder(name)).and_then(|config| config.kept(quant)).expect("a configuration")
}

fn decoder(folder: &Path, config: DecoderConfig, dtype: DType) -> Decoder {
    let files = WeightFiles::open(folder).expect("weights");
    files.decoder(config, dtype, &Console::silent()).expect("they fit")
}

/// Random values, not small, in both halves and in DoRA's lengths.
fn random(lora: &LoraConfig, decoder: &Decoder, seed: u64) -> Adapters {
    let modules = decoder.config().modules();
    let mut adapters = adapter::new(lora, &modules, seed, decoder.dtype(), &Device::Cpu).expect("made");
    adapters.fit(decoder, seed, &Console::silent()).expect("fitted");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tensors: Vec<Tensor> = adapters
        .tensors()
        .map(|(_, tensor)| {
            let values: Vec<f64> = (0..tensor.elem_count())
                .map(|_| 0.4 * (f64::from(rng.next_u32()) / f64::from(u32::MAX) - 0.5))
                .collect();
            let noise =
                Tensor::from_vec(values, tensor.dims(), &Device::Cpu).and_then(|t| t.to_dtype(tensor.dtype()));
            (tensor + noise.expect("made")).expect("moved")
        })
        .collect();
    adapters.replace(tensors).expect("replaced");
    adapters.measure(decoder).expect("measured");
    adapters
}

/// Two prompts with two answers each, of tokens that every fixture has.
fn batch(vocabulary: usize) -> Packed {
    let tokens = |seed: usize, len: usize| {
        (0..len).map(|i| ((seed * 13 + i * i + 5 * i) % vocabulary) as u32).collect::<Vec<_>>()
    };
    let mut packer = Packer::default();
    for seed in 0..2 {
        let branches = [tokens(seed + 3, 5), tokens(seed + 7, 9)];
        packer.push(0, &tokens(seed, 4), &branches.each_ref().map(|branch| branch.as_slice()), PromptSpan::No);
    }
    packer.finish()
}

fn logps(decoder: &Decoder, batch: &Packed, adapters: Option<&Adapters>) -> Vec<f64> {
    let hidden = decoder.hidden(batch, adapters).expect("computed");
    let (scores, _) = completion_logps::score(&hidden, decoder.head(), &batch.targets, Want::Scores).expect("scored");
    scores.iter().map(|score| score.logp).collect()
}

fn largest_difference(one: &[f64], two: &[f64]) -> f64 {
    assert_eq!(one.len(), two.len());
    one.iter().zip(two).map(|(one, two)| (one - two).abs()).fold(0.0, f64::max)
}

fn loras(config: &DecoderConfig) -> Vec<LoraConfig> {
    // scales that are not one: 4.5 / 3, 4.5 / √3
    let plain = LoraConfig { rank: 3, alpha: 4.5, ..LoraConfig::default() };
    let mut loras = vec![
        LoraConfig { rslora: true, ..plain.clone() },
        LoraConfig { dora: true, ..plain.clone() },
        LoraConfig { layers: Some(vec![1]), alphas: vec![("down_proj".into(), 1.0)], ..plain.clone() },
    ];
    loras.extend(config.projections().iter().map(|projection| LoraConfig {
        targets: Targets::Names(vec![projection.name().to_owned()]),
        ..plain.clone()
    }));
    loras.push(plain);
    loras
}

#[test]
fn in_memory_it_is_the_same_function() {
    for name in MODELS {
        for (quant_name, quant) in Quant::ALL {
            let decoder = decoder(&folder(name), config(name, quant), DType::F64);
            let batch = batch(decoder.config().vocab_size);
            let base = logps(&decoder, &batch, None);
            for (seed, lora) in loras(decoder.config()).iter().enumerate() {
                let adapters = random(lora, &decoder, seed as u64);
                let unmerged = logps(&decoder, &batch, Some(&adapters));
                let merged = logps(&decoder.merged(&adapters).expect("merged"), &batch, None);
                let what = format!("{name} in {quant_name}, {lora:?}");
                // f64, but for rope's f32 angles, which are the same in both
                assert!(largest_difference(&merged, &unmerged) < 1e-9, "{what}");
                // and the adapter does something that a wrong scale would change
                assert!(largest_difference(&base, &unmerged) > 1e-3, "{what}");
            }
        }
    }
}

#[test]
fn on_disk_it_is_the_same_function() {
    let console = Console::silent();
    for name in MODELS {
        let base = Base::local(&folder(name)).expect("there");
        for (quant_name, quant) in Quant::ALL {
            let config = config(name, quant);
            let decoder = decoder(&folder(name), config.clone(), DType::F32);
            let batch = batch(config.vocab_size);
            let lora = LoraConfig { rank: 3, alpha: 4.5, rslora: true, ..LoraConfig::default() };
            let adapters = random(&lora, &decoder, 9);
            let unmerged = logps(&decoder, &batch, Some(&adapters));
            let merge = Merge::new(&base, &config, &adapters).expect("opened");
            // f32 is exact but for sums in another order; the others round weights to 11 and 8 bits, of logits around one
            for (float, shard, tolerance) in [
                (Float::F32, usize::MAX, 3e-5),
                (Float::F32, 2000, 3e-5),
                (Float::F16, usize::MAX, 3e-2),
                (Float::Bf16, 5000, 2e-1),
            ] {
                let out = tempfile::tempdir().expect("a folder");
                let plan = MergedFolder::plan(&merge, Some(float), shard).expect("planned");
                plan.write(out.path(), &console).expect("written");
                let read = family::read_config(out.path()).expect("a configuration");
                let written = logps(&self::decoder(out.path(), read, DType::F32), &batch, None);
                let difference = largest_difference(&written, &unmerged);
                assert!(difference < tolerance, "{name} in {quant_name} as {float:?}: {difference}");
            }
        }
    }
}

#[test]
fn what_carries_no_adapter_is_copied_to_the_bit() {
    let base = Base::local(&folder("qwen2")).expect("there");
    let config = config("qwen2", Quant::None);
    let decoder = decoder(&folder("qwen2"), config.clone(), DType::F32);
    let lora = LoraConfig { targets: Targets::Names(vec!["q_proj".into()]), ..LoraConfig::default() };
    let adapters = random(&lora, &decoder, 1);
    let merge = Merge::new(&base, &config, &adapters).expect("opened");
    let out = tempfile::tempdir().expect("a folder");
    MergedFolder::plan(&merge, None, usize::MAX)
        .expect("planned")
        .write(out.path(), &Console::silent())
        .expect("written");
    let (before, after) =
        (WeightFiles::open(&folder("qwen2")).expect("opened"), WeightFiles::open(out.path()).expect("opened"));
    let tensors = |files: &WeightFiles| -> Vec<(String, Vec<u8>)> {
        files.tensors().map(|(name, file)| (name.to_owned(), file.raw(name).expect("there").2.to_vec())).collect()
    };
    let (before, after) = (tensors(&before), tensors(&after));
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.0, after.0);
        assert_eq!(before.1 == after.1, !before.0.ends_with("q_proj.weight"), "{}", before.0);
    }
}

#[derive(Deserialize)]
struct Tokenised {
    prompt_ids: Vec<u32>,
    chosen_ids: Vec<u32>,
    rejected_ids: Vec<u32>,
}

/// Log-probs that TRL's own run wrote of base, base + adapter and PEFT's merged model.
#[test]
fn log_probs_of_a_real_run_are_transformers() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("skipped: DPO_LORA_REAL is not set");
        return;
    };
    let trl = real.join("adapters/trl-dpo-stories260K");
    let text = |path: PathBuf| std::fs::read_to_string(path).expect("there");
    let tokenised: Vec<Tokenised> =
        text(trl.join("tokenised.jsonl")).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let expected: Vec<BTreeMap<String, f64>> =
        serde_json::from_str(&text(trl.join("sigmoid/pair_logps.json"))).expect("JSON");
    assert_eq!(tokenised.len(), expected.len());

    let base = real.join("stories260K");
    let config = family::read_config(&base).expect("a configuration");
    let decoder = decoder(&base, config.clone(), DType::F32);
    let adapters = peft::load(&trl.join("sigmoid/final"), &config.modules(), DType::F32).expect("read");
    let out = tempfile::tempdir().expect("a folder");
    let local = Base::local(&base).expect("there");
    let merge = Merge::new(&local, &config, &adapters).expect("opened");
    MergedFolder::plan(&merge, None, usize::MAX)
        .expect("planned")
        .write(out.path(), &Console::silent())
        .expect("written");
    let merged = self::decoder(out.path(), family::read_config(out.path()).expect("a configuration"), DType::F32);

    for (pair, expected) in tokenised.iter().zip(&expected) {
        let mut packer = Packer::default();
        packer.push(0, &pair.prompt_ids, &[&pair.chosen_ids, &pair.rejected_ids], PromptSpan::No);
        let batch = packer.finish();
        for (name, decoder, adapters) in
            [("ref", &decoder, None), ("policy", &decoder, Some(&adapters)), ("merged", &merged, None)]
        {
            let logps = logps(decoder, &batch, adapters);
            for (side, span) in ["chosen", "rejected"].into_iter().zip(&batch.spans) {
                let (ours, theirs) = (logps[span.clone()].iter().sum::<f64>(), expected[&format!("{name}_{side}")]);
                // sums of hundreds of f32 log-probs; theirs is one of f32 too
                assert!((ours - theirs).abs() < 1e-3, "{name} {side}: {ours} and {theirs}");
            }
        }
    }
}
