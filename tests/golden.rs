//! Against transformers, PEFT and TRL: `fixtures/golden`, made by `scripts/make_fixtures.py`.
//!
//! The fixtures were computed in f64 from weights stored in f32. Everything is compared twice, in f64 and in f32:
//!
//! * in f64 only the fixtures' own f32 parts are left: cosines and sines of rope (transformers rounds them in another
//!   place, up to 6e-8 of each) and the stored f32 tensors (6e-8 of each value);
//! * in f32, which training runs in, the rounding of a few hundred additions in a row remains: some 1e-6 of the
//!   numbers that were added.
//!
//! A wrong scale, sign, mask or frequency changes these models' numbers by more than a hundredth.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dpo_lora::adapter::{self, Adapters, Gradients, InitialWeights, LoraConfig, peft};
use dpo_lora::gguf::GgufFile;
use dpo_lora::model::generate::Stop;
use dpo_lora::model::memory::Saved;
use dpo_lora::model::{
    Adapter, Decoder, DecoderConfig, Keep, Model, Packed, Packer, PromptSpan, WeightFiles, family, gguf_decoder,
};
use dpo_lora::ops::completion_logps::TokenScore;
use dpo_lora::progress::Console;
use dpo_lora::tensor_file::TensorFile;
use dpo_lora::train::optimizer::{AdamW, Rate, clip};
use serde::Deserialize;
use serde::de::DeserializeOwned;

const LLAMAS: [&str; 4] = ["gqa", "tied", "llama3", "bias"];
const OTHERS: [&str; 7] = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"];

fn models() -> impl Iterator<Item = &'static str> {
    LLAMAS.into_iter().chain(OTHERS)
}

/// The adapters, each `model/adapter`.
fn adapters() -> Vec<String> {
    models().map(|model| format!("{model}/all")).chain(["gqa/rslora".to_owned(), "gqa/subset".to_owned()]).collect()
}

/// The type to compute in, and how far its numbers may be off, for values around one. See above.
const PRECISIONS: [(DType, f64); 2] = [(DType::F64, 5e-7), (DType::F32, 1e-5)];

#[derive(Deserialize)]
struct ModelGolden {
    ids: Vec<u32>,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct AdapterGolden {
    beta: f64,
    pairs: Vec<Pair>,
    loss: f64,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Pair {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
    policy_chosen: Scores,
    policy_rejected: Scores,
    reference_chosen: Vec<f64>,
    reference_rejected: Vec<f64>,
}

#[derive(Deserialize)]
struct Scores {
    logps: Vec<f64>,
    entropies: Vec<f64>,
    mean_logits: Vec<f64>,
    top1: Vec<bool>,
}

#[derive(Deserialize)]
struct Trajectory {
    learning_rate: f64,
    #[serde(default)]
    loraplus_ratio: Option<f64>,
    weight_decay: f64,
    max_grad_norm: f64,
    trl: Vec<Step>,
    torch: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

fn golden<T: DeserializeOwned>(path: &str) -> T {
    let text = std::fs::read_to_string(folder(path)).expect("the fixture is there");
    serde_json::from_str(&text).expect("the fixture is as the script writes it")
}

fn config(name: &str) -> DecoderConfig {
    family::read_config(&folder(name)).expect("transformers' config.json is read")
}

fn decoder(name: &str, dtype: DType) -> Decoder {
    let files = WeightFiles::open(&folder(name)).expect("transformers' safetensors are read");
    files.decoder(config(name), dtype, &Console::silent()).expect("the weights fit the config")
}

/// The model and the adapter of a fixture named `model/adapter`.
fn model(name: &str, dtype: DType) -> Model {
    let (base, _) = name.split_once('/').expect("model/adapter");
    let decoder = decoder(base, dtype);
    let adapters = peft::load(&folder(name), &decoder.config().modules(), dtype).expect("PEFT's files are read");
    Model::new(decoder, adapters).expect("made")
}

fn close(found: f64, expected: f64, tolerance: f64, what: &str) {
    let difference = (found - expected).abs();
    assert!(difference <= tolerance, "{what}: {found} is {difference:.1e} from {expected}, over {tolerance:e}");
}

/// Requires `found` to be `expected` to `tolerance` of the largest value expected.
fn close_tensors(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (found, expected) = (values(found).expect("numbers"), values(expected).expect("numbers"));
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    for (found, expected) in found.into_iter().zip(expected) {
        close(found, expected, tolerance * largest, what);
    }
}

/// The file's tensors in the order of the trainable ones, by PEFT's names.
fn in_order(file: &str, adapters: &Adapters) -> Vec<(String, Tensor)> {
    let file = TensorFile::open(&folder(file)).expect("the fixture is there");
    let read = |(name, tensor): (String, &Tensor)| {
        let read = file.read(&format!("base_model.model.{name}.weight"), tensor.dims(), DType::F64);
        (name, read.expect("a tensor of that name and shape"))
    };
    let tensors: Vec<_> = adapters.tensors().map(read).collect();
    assert_eq!(tensors.len(), file.names().len(), "nothing is left over");
    tensors
}

/// Whether the completions of a pair follow one prompt or each its own.
#[derive(Debug, Clone, Copy)]
enum Prompts {
    Shared,
    Twice,
}

/// All pairs in one batch; the spans are chosen and rejected of each pair.
fn pack(pairs: &[Pair], prompts: Prompts) -> Packed {
    let mut packer = Packer::default();
    for (key, pair) in pairs.iter().enumerate() {
        let branches = [pair.chosen.as_slice(), &pair.rejected];
        match prompts {
            Prompts::Shared => packer.push(key as u64, &pair.prompt, &branches, PromptSpan::No),
            Prompts::Twice => {
                for branch in branches {
                    packer.push(key as u64, &pair.prompt, &[branch], PromptSpan::No);
                }
            }
        }
    }
    packer.finish()
}

/// Log-probs of the spans: `[chosen, rejected]` of each pair.
fn sums(batch: &Packed, scores: &[TokenScore]) -> Vec<[f64; 2]> {
    let sum = |span: &std::ops::Range<usize>| scores[span.clone()].iter().map(|score| score.logp).sum();
    batch.spans.chunks_exact(2).map(|spans| [sum(&spans[0]), sum(&spans[1])]).collect()
}

fn reference_sums(pairs: &[Pair]) -> Vec<[f64; 2]> {
    pairs.iter().map(|pair| [pair.reference_chosen.iter().sum(), pair.reference_rejected.iter().sum()]).collect()
}

/// DPO's loss `−log σ(βΔ)`, mean over the pairs, and its derivative with respect to each policy log-prob (Rafailov et
/// al. 2023, eq. 7), written out here so that nothing of the library is compared with itself.
fn dpo(policy: &[[f64; 2]], reference: &[[f64; 2]], beta: f64) -> (f64, Vec<[f64; 2]>) {
    let pairs = policy.len() as f64;
    let (mut loss, mut slopes) = (0.0, Vec::new());
    for (policy, reference) in policy.iter().zip(reference) {
        let delta = (policy[0] - reference[0]) - (policy[1] - reference[1]);
        loss += (-beta * delta).exp().ln_1p() / pairs;
        let slope = -beta / (1.0 + (beta * delta).exp()) / pairs;
        slopes.push([slope, -slope]);
    }
    (loss, slopes)
}

/// The loss of the pairs and its gradients, in the order of the trainable tensors.
fn loss_and_gradients(model: &Model, golden: &AdapterGolden, prompts: Prompts) -> (f64, Vec<Tensor>) {
    let batch = pack(&golden.pairs, prompts);
    let saved = vec![Saved::All; model.decoder().config().num_layers()];
    let keep = Keep::Activations { dropout_key: 0, saved: &saved };
    let forward = model.forward(&batch, Adapter::On, keep).expect("computed");
    let (loss, slopes) = dpo(&sums(&batch, &forward.scores), &reference_sums(&golden.pairs), golden.beta);
    let mut rows = vec![0.0; batch.targets.len()];
    for (span, slope) in batch.spans.iter().zip(slopes.as_flattened()) {
        rows[span.clone()].fill(*slope);
    }
    let mut gradients = Gradients::default();
    model.backward(&batch, forward.activations.expect("kept"), &rows, &mut gradients).expect("computed");
    (loss, gradients.in_order(model.adapters()).expect("a gradient for every tensor"))
}

/// Logits follow from log-probabilities and the mean logit: `z = logp − mean(logp) + mean(z)`. A prompt with every
/// token of the vocabulary as a branch gives those of its last row.
#[test]
fn logits_are_those_of_transformers() {
    for name in models() {
        let expected: ModelGolden = golden(&format!("{name}/golden.json"));
        let vocab = config(name).vocab_size;
        let file = TensorFile::open(&folder(name).join("golden.safetensors")).expect("the fixture is there");
        let logits = file.read("logits", &[expected.ids.len(), vocab], DType::F64).expect("logits");
        let tokens: Vec<u32> = (0..vocab as u32).collect();
        let branches: Vec<&[u32]> = tokens.chunks(1).collect();
        let mut packer = Packer::default();
        // a beginning that short rope's long factors do not apply to is another sequence
        let first = config(name).ropes[0].long.as_ref().map_or(1, |(above, _)| *above);
        let logits = logits.narrow(0, first - 1, expected.ids.len() + 1 - first).expect("rows");
        for length in first..=expected.ids.len() {
            packer.push(0, &expected.ids[..length], &branches, PromptSpan::No);
        }
        let batch = packer.finish();
        for (dtype, tolerance) in PRECISIONS {
            let scores = decoder(name, dtype).forward(&batch, None, Keep::Scores).expect("computed").scores;
            let found: Vec<f64> = scores
                .chunks_exact(vocab)
                .flat_map(|row| {
                    let mean = row.iter().map(|score| score.logp).sum::<f64>() / vocab as f64;
                    row.iter().map(move |score| score.logp - mean + score.mean_logit)
                })
                .collect();
            let found = Tensor::new(found, logits.device()).expect("made");
            close_tensors(&found, &logits, tolerance, &format!("logits of {name} in {dtype:?}"));
        }
    }
}

/// The same models, as gguf's own writer has them under llama.cpp's keys and names, and with what its converter changes.
#[test]
fn gguf_files_give_the_scores_of_the_folders() {
    for name in ["gqa", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/quant/{name}.gguf"));
        let file = GgufFile::open(&path).expect("gguf's file is read");
        let expected = config(name);
        let found = family::read_gguf(&file).expect("its metadata is read");
        // a GGUF file says nothing of these, since all real models of its architecture have them the same; the tiny do not
        let (layers, attention_scale) = (expected.layers.clone(), expected.attention_scale);
        let ropes = [&found.ropes[..1], &expected.ropes[1..]].concat();
        let fixed = DecoderConfig { layers, attention_scale, ropes, ..found };
        // these are the file's own: norms are written as they multiply, matrices stay in it
        let (norm_offset, quantized_bytes) = (fixed.norm_offset, fixed.quantized_bytes);
        assert_eq!(fixed, DecoderConfig { norm_offset, quantized_bytes, ..expected }, "{name}");

        let golden: AdapterGolden = golden(&format!("{name}/all/golden.json"));
        let batch = pack(&golden.pairs, Prompts::Shared);
        for (dtype, tolerance) in PRECISIONS {
            let decoder = gguf_decoder(&file, fixed.clone(), dtype).expect("its weights are read");
            // adapters come out in Hugging Face's order of rows
            let adapters = model(&format!("{name}/all"), dtype).adapters().clone();
            let model = Model::new(decoder, adapters).expect("made");
            let scores = model.forward(&batch, Adapter::On, Keep::Scores).expect("computed").scores;
            let policy = golden.pairs.iter().flat_map(|pair| [&pair.policy_chosen, &pair.policy_rejected]);
            let expected: Vec<f64> = policy.flat_map(|scores| scores.logps.iter().copied()).collect();
            let found = batch.spans.iter().flat_map(|span| scores[span.clone()].iter());
            for (found, expected) in found.zip(expected) {
                close(found.logp, expected, 10.0 * tolerance, &format!("{name} of GGUF in {dtype:?}"));
            }
        }
    }
}

/// Both round `θ^(−2j/E)` to f32 but not by the same steps: two units in the last place.
#[test]
fn inverse_frequencies_are_those_of_transformers() {
    for name in LLAMAS {
        let found = config(name).ropes.remove(0).inverse_frequencies;
        let file = TensorFile::open(&folder(name).join("golden.safetensors")).expect("the fixture is there");
        let expected = file.read("inverse_frequencies", &[found.len()], DType::F64).expect("frequencies");
        for (found, expected) in found.into_iter().zip(expected.to_vec1::<f64>().expect("f64")) {
            close(f64::from(found), expected, 2.4e-7 * expected, name);
        }
    }
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let answer = |model: &Model, prompt: &[u32], adapter, tokens: &[u32]| {
        let stop = Stop { tokens, max_new_tokens: 12 };
        model.generate(prompt, adapter, &stop).expect("computed")
    };
    for name in &adapters() {
        let (base, _) = name.split_once('/').expect("model/adapter");
        let off: ModelGolden = golden(&format!("{base}/golden.json"));
        let on: AdapterGolden = golden(&format!("{name}/golden.json"));
        assert_ne!(on.greedy, off.greedy, "the adapter shows");
        let model = model(name, DType::F32);
        assert_eq!(answer(&model, &off.prompt, Adapter::Off, &[]), off.greedy, "{name}, adapter off");
        assert_eq!(answer(&model, &on.prompt, Adapter::On, &[]), on.greedy, "{name}, adapter on");
        let stop = on.greedy[7];
        let before = on.greedy.iter().take_while(|&&token| token != stop).count();
        assert_eq!(
            answer(&model, &on.prompt, Adapter::On, &[stop]),
            on.greedy[..before],
            "{name}, with a stop token"
        );
    }
}

#[test]
fn token_scores_are_those_of_peft_with_the_adapter_on_and_off() {
    let (mut most_probable, mut others) = (0, 0);
    for name in &adapters() {
        let golden: AdapterGolden = golden(&format!("{name}/golden.json"));
        for (dtype, tolerance) in PRECISIONS {
            // log-probabilities go down to −20
            let tolerance = 10.0 * tolerance;
            let model = model(name, dtype);
            for prompts in [Prompts::Shared, Prompts::Twice] {
                let batch = pack(&golden.pairs, prompts);
                let on = model.forward(&batch, Adapter::On, Keep::Scores).expect("computed").scores;
                let off = model.forward(&batch, Adapter::Off, Keep::Scores).expect("computed").scores;
                let policy = golden.pairs.iter().flat_map(|pair| [&pair.policy_chosen, &pair.policy_rejected]);
                let reference =
                    golden.pairs.iter().flat_map(|pair| [&pair.reference_chosen, &pair.reference_rejected]);
                for ((span, policy), reference) in batch.spans.iter().zip(policy).zip(reference) {
                    assert_eq!(span.len(), policy.logps.len());
                    for (i, row) in span.clone().enumerate() {
                        let what = format!("{name} in {dtype:?}, {prompts:?}, row {row}");
                        close(on[row].logp, policy.logps[i], tolerance, &what);
                        close(on[row].entropy, policy.entropies[i], tolerance, &what);
                        close(on[row].mean_logit, policy.mean_logits[i], tolerance, &what);
                        close(off[row].logp, reference[i], tolerance, &what);
                        assert_eq!(on[row].top1, policy.top1[i], "{what}");
                        *(if on[row].top1 { &mut most_probable } else { &mut others }) += 1;
                    }
                }
            }
        }
    }
    assert!(most_probable > 0 && others > 0, "targets of both kinds are tested");
}

#[test]
fn the_gradient_of_every_adapter_tensor_is_torchs() {
    for name in &adapters() {
        let golden: AdapterGolden = golden(&format!("{name}/golden.json"));
        for (dtype, tolerance) in PRECISIONS {
            let model = model(name, dtype);
            let expected = in_order(&format!("{name}/gradients.safetensors"), model.adapters());
            for prompts in [Prompts::Shared, Prompts::Twice] {
                let (loss, gradients) = loss_and_gradients(&model, &golden, prompts);
                close(loss, golden.loss, 10.0 * tolerance, &format!("loss of {name} in {dtype:?}"));
                for ((tensor, expected), found) in expected.iter().zip(&gradients) {
                    let what = format!("gradient of {tensor} of {name} in {dtype:?}, {prompts:?}");
                    // chosen and rejected pull in opposite ways: what remains is smaller than what was added
                    close_tensors(found, expected, 5.0 * tolerance, &what);
                }
            }
        }
    }
}

/// The steps that TRL's DPOTrainer logged, which the script found to be torch's own to f32's rounding.
///
/// Adam divides each element's gradient by that element's own size, so rounding grows where a gradient is small: the
/// tolerances are ten times the usual ones. Weight decay alone moves the tensors by up to 1e-3.
#[test]
fn ten_adamw_steps_are_those_of_trl_and_torch() {
    for name in ["adamw-plain", "adamw-decay", "adamw-loraplus"] {
        let golden: AdapterGolden = golden("gqa/all/golden.json");
        let expected: Trajectory = self::golden(&format!("gqa/all/{name}.json"));
        let (trl, ratio) = if name == "adamw-loraplus" { (0, Some(4.0)) } else { (10, None) };
        assert_eq!((expected.trl.len(), expected.torch.len(), expected.loraplus_ratio), (trl, 10, ratio));
        for (dtype, tolerance) in PRECISIONS {
            let tolerance = 10.0 * tolerance;
            let mut model = model("gqa/all", dtype);
            let mut optimizer = AdamW::new(model.adapters()).expect("made");
            for (step, torch) in expected.torch.iter().enumerate() {
                let what = format!("{name} in {dtype:?}, step {}", step + 1);
                let (loss, mut gradients) = loss_and_gradients(&model, &golden, Prompts::Shared);
                let norm = clip(&mut gradients, expected.max_grad_norm).expect("computed");
                close(loss, torch.loss, tolerance, &what);
                close(norm, torch.grad_norm, tolerance, &what);
                if let Some(trl) = expected.trl.get(step) {
                    close(loss, trl.loss, 1e-5, &what);
                    close(norm, trl.grad_norm, 1e-4 * trl.grad_norm, &what);
                }
                let (learning_rate, weight_decay) = (expected.learning_rate, expected.weight_decay);
                let loraplus_ratio = ratio.unwrap_or(1.0);
                let rate = Rate { learning_rate, loraplus_ratio, weight_decay };
                let updated = optimizer.step(model.adapters(), &gradients, rate).expect("computed");
                model.replace(updated).expect("replaced");
            }
            let after = in_order(&format!("gqa/all/{name}.safetensors"), model.adapters());
            for ((tensor, expected), (_, found)) in after.iter().zip(model.adapters().tensors()) {
                close_tensors(found, expected, tolerance, &format!("{tensor} after {name} in {dtype:?}"));
            }
        }
    }
}

/// PEFT takes the first value of such an adapter out of the base; here a frozen part of the adapter does, and the base
/// with the adapters off stays what it was.
#[test]
fn first_values_made_of_the_base_are_those_of_peft_and_leave_the_policy_the_base() {
    let decoder = decoder("gqa", DType::F32);
    let modules = decoder.config().modules();
    let all: AdapterGolden = golden("gqa/all/golden.json");
    let batch = pack(&all.pairs, Prompts::Shared);
    for (name, weights) in [("pissa", InitialWeights::Pissa), ("olora", InitialWeights::Olora)] {
        let theirs = TensorFile::open(&folder(&format!("gqa/{name}.safetensors"))).expect("the fixture is there");
        for dora in [false, true] {
            let config = LoraConfig { rank: 4, alpha: 6.0, weights, dora, ..LoraConfig::default() };
            let mut adapters = adapter::new(&config, &modules, 1, DType::F32, &Device::Cpu).expect("made");
            adapters.fit(&decoder, 1, &Console::silent()).expect("fitted");
            let own: Vec<Tensor> = adapters.tensors().map(|(_, tensor)| tensor.clone()).collect();
            for (module, own) in modules.iter().zip(own.chunks(if dora { 3 } else { 2 })) {
                let shape = [module.outputs, module.inputs];
                let expected = theirs.read(&module.path, &shape, DType::F32).expect("read");
                let found = (own[1].matmul(&own[0]).expect("of one rank") * 1.5).expect("scaled");
                // f32's rounding in PEFT's SVD and ours
                close_tensors(&found, &expected, 2e-5, &format!("{name} of {}", module.path));
            }
            let model = Model::new(decoder.clone(), adapters).expect("made");
            let scores = |adapter| model.forward(&batch, adapter, Keep::Scores).expect("computed").scores;
            for (on, off) in scores(Adapter::On).iter().zip(scores(Adapter::Off)) {
                close(on.logp, off.logp, 2e-5, name);
            }
            // and a reader who knows of no frozen part computes the same
            let place = tempfile::tempdir().expect("a folder");
            peft::save(model.adapters(), "tiny", place.path()).expect("written");
            let loaded = peft::load(place.path(), &modules, DType::F32).expect("read");
            for (ours, theirs) in model.adapters().iter().zip(loaded.iter()) {
                assert_eq!((ours.rank(), ours.scale()), (8, 1.5));
                assert_eq!((theirs.rank(), theirs.scale()), (8, 1.5));
            }
        }
    }
}

#[test]
fn an_adapter_of_peft_is_saved_as_peft_saved_it() {
    for name in &adapters() {
        let (base, _) = name.split_once('/').expect("model/adapter");
        let modules = config(base).modules();
        let loaded = peft::load(&folder(name), &modules, DType::F32).expect("PEFT's files are read");
        let place = tempfile::tempdir().expect("a folder");
        peft::save(&loaded, "tiny", place.path()).expect("written");
        let open = |folder: &Path| TensorFile::open(&folder.join(peft::TENSORS_FILE)).expect("readable");
        let (theirs, ours) = (open(&folder(name)), open(place.path()));
        assert_eq!(ours.names(), theirs.names());
        for tensor in theirs.names() {
            let shape = theirs.shape(&tensor).expect("it is there");
            let values = |file: &TensorFile| {
                let values = file.read(&tensor, shape, DType::F32)?.flatten_all().and_then(|t| t.to_vec1::<f32>());
                Ok::<_, dpo_lora::tensor_file::TensorFileError>(values.expect("f32"))
            };
            assert_eq!(values(&ours).expect("read"), values(&theirs).expect("read"), "{tensor}");
        }
        let config = |folder: &Path| -> serde_json::Map<String, serde_json::Value> {
            let text = std::fs::read_to_string(folder.join(peft::CONFIG_FILE)).expect("it is there");
            serde_json::from_str(&text).expect("JSON")
        };
        let (theirs, ours) = (config(&folder(name)), config(place.path()));
        for (key, value) in &ours {
            assert_eq!(Some(value), theirs.get(key), "`{key}` of {name}");
        }
        // options of newer PEFT versions, which older readers would not know: all of them off
        let left_out: Vec<_> = theirs.into_iter().filter(|(key, _)| !ours.contains_key(key)).collect();
        assert!(left_out.iter().all(|(_, value)| value.is_null()), "{left_out:?}");
    }
}
