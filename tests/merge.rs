//! Merged is unmerged: for every family, every projection, every kind of base and of adapter, in memory and on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dpo_lora::adapter::{self, Adapters, LoraConfig, Targets, peft};
use dpo_lora::data::Codec;
use dpo_lora::export::{Float, LoraGguf, Merge, MergedFolder, MergedGguf};
use dpo_lora::gguf::GgufFile;
use dpo_lora::model::{Base, Decoder, DecoderConfig, Packed, Packer, PromptSpan, WeightFiles, family};
use dpo_lora::ops::completion_logps::{self, Want};
use dpo_lora::progress::Console;
use dpo_lora::quant::{Quant, Weight};
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

/// A tokenizer of few enough tokens for every fixture.
fn tokenizer() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"<end>": 0, "e": 1, "l": 2, "o": 3, "lo": 4}, "merges": [["l", "o"]]},
    });
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).expect("written");
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<end>"}"#).expect("written");
    folder
}

/// A fixture, with what llama.cpp takes for granted and its files say nothing of: the scale of Gemma's attention, one layer
/// of six without a window in Gemma 3, and one of four without positions in SmolLM3.
fn as_llama_cpp_has_it(name: &str, place: &Path) -> PathBuf {
    let layers = match name {
        "gemma2" => 2,
        "gemma3" => 6,
        "smollm3" => 4,
        _ => return folder(name),
    };
    let (own, copy) = (folder(name), place.join(name));
    std::fs::create_dir(&copy).expect("made");
    // a model of two layers, and the same two over and over
    let mut tensors = candle_core::safetensors::load(own.join("model.safetensors"), &Device::Cpu).expect("read");
    for layer in 2..layers {
        let prefix = format!("model.layers.{}.", layer % 2);
        let mut names: Vec<String> = tensors.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
        names.sort();
        for name in names {
            let copied = tensors[&name].clone();
            tensors.insert(name.replace(&prefix, &format!("model.layers.{layer}.")), copied);
        }
    }
    candle_core::safetensors::save(&tensors, copy.join("model.safetensors")).expect("written");
    let text = std::fs::read_to_string(own.join("config.json")).expect("there");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    config["num_hidden_layers"] = layers.into();
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    let of_layers = |of: fn(usize) -> serde_json::Value| (1..=layers).map(of).collect();
    match name {
        "gemma3" => {
            let kind = |i: usize| if i == 6 { "full_attention" } else { "sliding_attention" }.into();
            config["layer_types"] = of_layers(kind);
        }
        "smollm3" => {
            config["no_rope_layers"] = of_layers(|i| usize::from(i != 4).into());
            config.as_object_mut().expect("an object").remove("layer_types");
        }
        _ => {}
    }
    std::fs::write(copy.join("config.json"), config.to_string()).expect("written");
    copy
}

#[test]
fn what_a_gguf_file_cannot_say_is_not_written() {
    let tokenizer = tokenizer();
    let codec = Codec::open(tokenizer.path(), None).expect("a tokenizer");
    let place = tempfile::tempdir().expect("a folder");
    for (name, what) in [
        ("gemma2", "the scale of its attention"),
        ("gemma3", "the scale of its attention"),
        ("smollm3", "which layers have positions"),
    ] {
        let base = Base::local(&folder(name)).expect("there");
        let config = config(name, Quant::None);
        let adapters = random(&LoraConfig::default(), &decoder(&folder(name), config.clone(), DType::F32), 1);
        let merge = Merge::new(&base, &config, &adapters).expect("opened");
        let plan = MergedGguf::plan(&merge, &codec, name, Quant::F16).expect("planned");
        let error =
            plan.write(&place.path().join("merged.gguf"), &Console::silent()).expect_err("it says another scale");
        assert!(error.to_string().contains(&format!("would not say {what}")), "{error}");
        assert_eq!(std::fs::read_dir(place.path()).expect("a folder").count(), 0);
    }
}

#[test]
fn in_gguf_it_is_the_same_function_and_rounded_as_the_type_rounds() {
    let console = Console::silent();
    let tokenizer = tokenizer();
    let codec = Codec::open(tokenizer.path(), None).expect("a tokenizer");
    let place = tempfile::tempdir().expect("a folder");
    let out = place.path().join("merged.gguf");
    for name in MODELS {
        let folder = as_llama_cpp_has_it(name, place.path());
        let base = Base::local(&folder).expect("there");
        let config = base.config(Quant::None).expect("a configuration");
        let decoder = decoder(&folder, config.clone(), DType::F32);
        let batch = batch(config.vocab_size);
        let lora = LoraConfig { rank: 3, alpha: 4.5, rslora: true, ..LoraConfig::default() };
        let adapters = random(&lora, &decoder, 9);
        let merge = Merge::new(&base, &config, &adapters).expect("opened");
        for (quant_name, quant) in Quant::ALL.into_iter().filter(|(_, quant)| *quant != Quant::Nf4) {
            let plan = MergedGguf::plan(&merge, &codec, name, quant).expect("planned");
            plan.write(&out, &console).unwrap_or_else(|e| panic!("{name} in {quant_name}: {e}"));
            let bytes = std::fs::metadata(&out).expect("there").len();
            assert_eq!(bytes, plan.num_bytes().expect("fits") as u64);
            let written = Base::local(&out).expect("there");
            let read = written.config(Quant::None).expect("a configuration");
            let files = written.files().expect("opened");
            for (part, there) in config.parts().expect("parts").iter().zip(read.parts().expect("parts")) {
                let values = merge.merged(part).expect("merged");
                let expected = match part.shape() {
                    [rows, columns] => {
                        let kept = match part.is_vocabulary() {
                            true => quant.of_embedding(*columns),
                            false => quant.of_linear(*columns),
                        };
                        let values = values.flatten_all().and_then(|values| values.to_vec1()).expect("values");
                        kept.keep(*rows, *columns, values).and_then(|kept| kept.dense(DType::F32)).expect("kept")
                    }
                    _ => values,
                };
                let found = files.read(&there, &read).and_then(|found| Ok(found.dense(DType::F32)?)).expect("read");
                let all = |tensor: Tensor| tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>());
                let (expected, found) = (all(expected).expect("values"), all(found).expect("values"));
                assert_eq!(expected, found, "{name} in {quant_name}: {}", part.gguf_name());
            }
            // of these llama.cpp knows no windows, which is told
            let windowless = ["mistral", "qwen2"].contains(&name);
            assert_eq!(windowless, config.layers.iter().map(|l| l.window).ne(read.layers.iter().map(|l| l.window)));
            if quant == Quant::None && !windowless {
                let unmerged = logps(&decoder, &batch, Some(&adapters));
                let (read, _) = written.load(read, &console).expect("loaded");
                let difference = largest_difference(&logps(&read, &batch, None), &unmerged);
                // as on disk in f32
                assert!(difference < 3e-5, "{name}: {difference}");
            }
        }
    }
}

#[test]
fn a_gguf_base_in_its_own_type_keeps_what_carries_no_adapter_to_the_bit() {
    let console = Console::silent();
    let tokenizer = tokenizer();
    let codec = Codec::open(tokenizer.path(), None).expect("a tokenizer");
    let place = tempfile::tempdir().expect("a folder");
    for name in ["llama3", "qwen3"] {
        let config = config(name, Quant::None);
        let decoder = decoder(&folder(name), config.clone(), DType::F32);
        let lora = LoraConfig { targets: Targets::Names(vec!["o_proj".into()]), ..LoraConfig::default() };
        let adapters = random(&lora, &decoder, 1);
        let [once, twice] = ["once", "twice"].map(|end| place.path().join(format!("{name}-{end}.gguf")));
        for (base, out) in [(folder(name), &once), (once.clone(), &twice)] {
            let base = Base::local(&base).expect("there");
            let config = base.config(Quant::None).expect("a configuration");
            let merge = Merge::new(&base, &config, &adapters).expect("opened");
            let plan = MergedGguf::plan(&merge, &codec, "again", Quant::Q4_0).expect("planned");
            plan.write(out, &console).expect("written");
        }
        let [once, twice] = [&once, &twice].map(|path| GgufFile::open(path).expect("opened"));
        assert!(once.all_metadata().eq(twice.all_metadata()), "{name}");
        for ((tensor, info), (other, same)) in once.tensors().zip(twice.tensors()) {
            assert_eq!((tensor, &info.shape, info.kind), (other, &same.shape, same.kind));
            assert_eq!(once.raw(tensor) == twice.raw(other), !tensor.contains("attn_output"), "{name}: {tensor}");
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

/// The converter's files of a real model, value by value.
#[test]
fn gguf_files_of_a_real_model_are_llama_cpps() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
        eprintln!("skipped: DPO_LORA_REAL is not set");
        return;
    };
    let folder = real.join("stories260K");
    let base = Base::local(&folder).expect("there");
    let config = base.config(Quant::None).expect("a configuration");
    let codec = Codec::open(&folder, None).expect("a tokenizer");
    // of an adapter whose B is zero nothing is added
    let adapters =
        adapter::new(&LoraConfig::default(), &config.modules(), 1, DType::F32, &Device::Cpu).expect("made");
    let merge = Merge::new(&base, &config, &adapters).expect("opened");
    let place = tempfile::tempdir().expect("a folder");
    for (name, quant) in [("f32", Quant::None), ("q8_0", Quant::Q8_0)] {
        let out = place.path().join(format!("{name}.gguf"));
        let plan = MergedGguf::plan(&merge, &codec, "stories260K", quant).expect("planned");
        plan.write(&out, &Console::silent()).expect("written");
        let theirs = GgufFile::open(&folder.join(format!("reference/stories260K-{name}.gguf"))).expect("opened");
        let ours = GgufFile::open(&out).expect("opened");
        let keys = |file: &GgufFile| file.all_metadata().map(|(key, _)| key.to_owned()).collect::<BTreeSet<_>>();
        let only = |one: &GgufFile, two: &GgufFile| keys(one).difference(&keys(two)).cloned().collect::<Vec<_>>();
        // a name for the size, a flag for separators; theirs leaves a frequency out that llama.cpp assumes
        assert_eq!(only(&theirs, &ours), ["general.size_label", "tokenizer.ggml.add_sep_token"]);
        assert_eq!(only(&ours, &theirs), ["llama.rope.freq_base"]);
        for (key, value) in theirs.all_metadata().filter(|(key, _)| *key != "tokenizer.ggml.scores") {
            assert!(ours.metadata(key).is_none_or(|ours| ours == value), "{key}: {value:?}");
        }
        // theirs are of tokenizer.model, ours of tokenizer.json's merges: only their order counts
        let order = |file: &GgufFile| {
            let list = |key: &str| file.metadata(key).and_then(|value| value.as_array()).expect("a list").to_vec();
            let mut scored: Vec<_> = list("tokenizer.ggml.tokens")
                .into_iter()
                .zip(list("tokenizer.ggml.scores"))
                .filter_map(|(token, score)| Some((token.as_str()?.to_owned(), score.as_f64()?)))
                .filter(|(token, _)| token.chars().count() > 1 && !token.starts_with('<'))
                .collect();
            scored.sort_by(|(_, one), (_, two)| two.total_cmp(one));
            scored.into_iter().map(|(token, _)| token).collect::<Vec<_>>()
        };
        assert!(order(&ours).len() > 100);
        assert_eq!(order(&ours), order(&theirs));
        assert_eq!(ours.tensors().count(), theirs.tensors().count());
        for (tensor, info) in theirs.tensors() {
            let found = ours.tensor(tensor).map(|ours| (&ours.shape, ours.kind));
            assert_eq!(found, Some((&info.shape, info.kind)), "{tensor}");
            assert!(ours.raw(tensor) == theirs.raw(tensor), "{tensor}");
        }
    }
}

/// Both factors of every module, with one alpha, as llama.cpp multiplies them.
#[test]
fn an_adapter_in_gguf_is_the_same_update() {
    let place = tempfile::tempdir().expect("a folder");
    let out = place.path().join("lora.gguf");
    for name in MODELS {
        let decoder = decoder(&folder(name), config(name, Quant::None), DType::F32);
        let config = decoder.config();
        for lora in [
            LoraConfig { rank: 3, alpha: 4.5, ..LoraConfig::default() },
            LoraConfig {
                rank: 3,
                alpha: 4.5,
                rslora: true,
                ranks: vec![("o_proj".into(), 2)],
                ..LoraConfig::default()
            },
        ] {
            let adapters = random(&lora, &decoder, 5);
            LoraGguf::plan(&adapters, config, name).expect("planned").write(&out).expect("written");
            let file = GgufFile::open(&out).expect("opened");
            let text = |key: &str| file.metadata(key).and_then(|value| value.as_str()).expect("a text").to_owned();
            assert_eq!((text("general.type"), text("adapter.type")), ("adapter".into(), "lora".into()));
            let architecture = text("general.architecture");
            let alpha = file.metadata("adapter.lora.alpha").and_then(|value| value.as_f64()).expect("a number");
            assert_eq!(file.tensors().count(), 2 * adapters.iter().count());
            for part in config.parts().expect("parts") {
                let Some(lora) = part.module().and_then(|module| adapters.get(module)) else { continue };
                let [a, b] = ["lora_a", "lora_b"].map(|end| {
                    let name = format!("{}.{end}", part.gguf_name());
                    let shape = &file.tensor(&name).expect("there").shape;
                    let matrix = file.matrix(&name, [shape[0], shape[1]]).expect("a matrix");
                    // its rows back in Hugging Face's order
                    let matrix = match ["llama", "smollm3"].contains(&architecture.as_str())
                        && part.is_turned()
                        && end == "lora_b"
                    {
                        true => matrix.unpaired(config.head_dim),
                        false => matrix,
                    };
                    Weight::Quantized(matrix).dense(DType::F32).expect("values")
                });
                let scale = alpha / a.dim(0).expect("a rank") as f64;
                let update = |a: &Tensor, b: &Tensor, scale: f64| {
                    let product = b.matmul(a).and_then(|product| (product * scale)?.flatten_all()?.to_vec1::<f32>());
                    product.expect("multiplied").into_iter().map(f64::from).collect::<Vec<_>>()
                };
                let (ours, expected) = (update(&a, &b, scale), update(lora.a(), lora.b(), lora.scale()));
                // sums of three products of f32
                assert!(largest_difference(&ours, &expected) < 1e-6, "{name}: {}", part.gguf_name());
            }
        }
    }
}
