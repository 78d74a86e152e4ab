//! Whole models: gradients against the CPU's, a recipe on both, and updates of models as large as people train.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use dpo_lora::adapter::{self, Adapters, Gradients, LoraConfig};
use dpo_lora::device::DeviceChoice;
use dpo_lora::hub::Hub;
use dpo_lora::model::flops::Load;
use dpo_lora::model::memory::{Rows, Saved, Shape};
use dpo_lora::model::{Adapter, Base, Decoder, Keep, Model, ModelConfig, Packed, Packer, PromptSpan};
use dpo_lora::model::{family, random_decoder};
use dpo_lora::ops::cuda::{free_memory, peak_memory};
use dpo_lora::ops::linear;
use dpo_lora::progress::Console;
use dpo_lora::quant::{Quant, Weight};
use dpo_lora::train::AdamW;
use dpo_lora::train::optimizer::{self, Rate};
use dpo_lora::{cli, commands};
use rand_chacha::rand_core::Rng;
use serde_json::{Value, json};

use super::Check;

type Outcome<T = ()> = Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

const RECIPE: &str = "recipes/quickstart.toml";

/// The quickstart's model, with adapters that are not zero: log-probs and gradients in f32 and in bf16, of a base as it is
/// and of quantized ones, with everything kept and with everything computed again.
pub(crate) fn gradients(check: &mut Check) -> Outcome {
    let recipe = PathBuf::from(check.recipe.clone().unwrap_or_else(|| RECIPE.to_owned()));
    let source = recipe.parent().unwrap_or(Path::new(".")).join("quickstart/model");
    let source = source.canonicalize().map_err(|e| format!("{}: {e}", source.display()))?;
    // in f32 only the order of sums differs, over all layers; bf16 rounds every activation to 2^-9
    let types = [(DType::F32, 1e-4, 1e-3), (DType::BF16, 2e-2, 6e-2)];
    for quant in [Quant::None, Quant::Nf4, Quant::Q8_0, Quant::Q4K] {
        let config = ModelConfig { source: source.clone(), quant, revision: None, file: None };
        let base = Base::locate(&config, Hub::from_env, &Console::silent()).map_err(text)?;
        let decoder = base.config(quant).map_err(text)?;
        let (decoder, _) = base.load(decoder, &Console::silent()).map_err(text)?;
        let adapters = random_adapters(check, &decoder)?;
        let vocabulary = decoder.config().vocab_size;
        let lengths =
            if check.small { vec![(5, 4, 7), (3, 6, 2)] } else { vec![(60, 80, 50), (9, 200, 130), (100, 3, 90)] };
        let (batch, _) = batch(check, &lengths, vocabulary);
        let slopes: Vec<f64> = (0..batch.targets.len()).map(|i| if i % 3 == 0 { -0.7 } else { 0.4 }).collect();
        let model = Model::new(decoder, adapters).map_err(text)?;
        let layers = model.decoder().config().num_layers();
        let (right, learned) = both(&model, &batch, &slopes, &vec![Saved::All; layers])?;
        for (dtype, of_logps, of_gradients) in types {
            for (saved, resident) in [(Saved::All, 0), (Saved::Input, 0), (Saved::WithoutGateUp, usize::MAX)] {
                if quant != Quant::None && (dtype == DType::F32) == (saved == Saved::Input) {
                    continue;
                }
                let there = model.clone().to_device(&check.device, dtype, resident).map_err(text)?;
                let (found, gradients) = both(&there, &batch, &slopes, &vec![saved; layers])?;
                let how = format!("{}, {}, {}", quant.name(), dtype.as_str(), saved.describe());
                check.compare(format!("log-probs ({how})"), &found, &right, of_logps).map_err(text)?;
                check.compare(format!("gradients ({how})"), &gradients, &learned, of_gradients).map_err(text)?;
            }
        }
    }
    Ok(())
}

fn random_adapters(check: &mut Check, decoder: &Decoder) -> Outcome<Adapters> {
    let lora = LoraConfig { rank: 4, ..LoraConfig::default() };
    let mut adapters = adapter::new(&lora, &decoder.config().modules(), 1, DType::F32, &Device::Cpu).map_err(text)?;
    let shapes: Vec<_> = adapters.tensors().map(|(_, tensor)| tensor.shape().clone()).collect();
    let tensors = shapes.into_iter().map(|shape| (check.normal(shape, DType::BF16)? * 0.05)?.to_dtype(DType::F32));
    adapters.replace(tensors.collect::<candle_core::Result<Vec<_>>>().map_err(text)?).map_err(text)?;
    Ok(adapters)
}

/// A prompt and two completions each, of these lengths; and which of the batch's spans belong to which pair.
fn batch(check: &mut Check, lengths: &[(usize, usize, usize)], vocabulary: usize) -> (Packed, usize) {
    let mut packer = Packer::default();
    let mut ids = |count: usize| -> Vec<u32> {
        (0..count).map(|_| (check.rng.next_u64() % vocabulary as u64) as u32).collect()
    };
    for (key, &(prompt, chosen, rejected)) in lengths.iter().enumerate() {
        let (prompt, chosen, rejected) = (ids(prompt), ids(chosen), ids(rejected));
        packer.push(key as u64, &prompt, &[&chosen, &rejected], PromptSpan::No);
    }
    (packer.finish(), lengths.len())
}

/// Log-probs of all targets, and the gradients of all adapters one after the other.
fn both(model: &Model, batch: &Packed, slopes: &[f64], saved: &[Saved]) -> Outcome<(Tensor, Tensor)> {
    let forward = model.forward(batch, Adapter::On, Keep::Activations { dropout_key: 0, saved }).map_err(text)?;
    let logps: Vec<f64> = forward.scores.iter().map(|score| score.logp).collect();
    let mut gradients = Gradients::default();
    let activations = forward.activations.ok_or("nothing was kept")?;
    model.backward(batch, activations, slopes, &mut gradients).map_err(text)?;
    let flat = |tensor: Tensor| tensor.to_device(&Device::Cpu)?.flatten_all();
    let gradients = gradients.in_order(model.adapters()).map_err(text)?.into_iter().map(flat);
    let gradients = gradients.collect::<candle_core::Result<Vec<_>>>().map_err(text)?;
    let count = logps.len();
    let logps = Tensor::from_vec(logps, count, &Device::Cpu).map_err(text)?;
    Ok((logps, Tensor::cat(&gradients, 0).map_err(text)?))
}

/// A recipe on the CPU and on the GPU: the same loss, update by update, and the same held-out numbers.
pub(crate) fn recipe(check: &mut Check) -> Outcome {
    let recipe = PathBuf::from(check.recipe.clone().unwrap_or_else(|| RECIPE.to_owned()));
    let folder = std::env::temp_dir().join(format!("gpu_check-{}", std::process::id()));
    let outcome = on_both(check, &recipe, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

fn on_both(check: &mut Check, recipe: &Path, folder: &Path) -> Outcome {
    let mut lines = Vec::new();
    for device in [DeviceChoice::Cpu, DeviceChoice::Cuda(0)] {
        let out = folder.join(device.to_string().replace(':', ""));
        let mut overrides = vec!["reference.cache=\"run\"".to_owned()];
        if check.small {
            let few = ["train.steps=3", "train.batch_size=2", "eval.samples=1", "eval.max_new_tokens=4"];
            overrides.extend(few.map(str::to_owned));
        }
        let run = cli::Run {
            recipe: Some(recipe.to_owned()),
            overrides,
            out: Some(out.clone()),
            resume: None,
            device: Some(device),
            json: false,
            quiet: true,
        };
        let started = Instant::now();
        commands::run::run(&run).map_err(|failure| format!("{device}: {failure:?}"))?;
        eprintln!("  {device}: {:.1} s", started.elapsed().as_secs_f64());
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).map_err(text)?;
        let parsed: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.push(parsed);
    }
    let [here, there] = &lines[..] else { return Err("two runs".to_owned()) };
    if here.len() != there.len() || here.is_empty() {
        return Err(format!("{} lines of metrics on the CPU, {} on the GPU", here.len(), there.len()));
    }
    // bf16 rounds log-probs of some hundred nats by some hundredths, and losses are about one
    for (key, most) in [("loss", 2e-2), ("grad_norm", 5e-2), ("eval_loss", 2e-2), ("eval_perplexity", 1e-2)] {
        let of = |lines: &[Value]| -> Vec<f64> { lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect() };
        let (right, found) = (of(here), of(there));
        let count = right.len();
        if count == 0 || found.len() != count {
            return Err(format!("{key}: {count} on the CPU, {} on the GPU", found.len()));
        }
        let tensor = |values: Vec<f64>| Tensor::from_vec(values, count, &Device::Cpu).map_err(text);
        let (right, found) = (tensor(right)?, tensor(found)?);
        check.compare(format!("recipe: {key}, {count} of them"), &found, &right, most).map_err(text)?;
    }
    Ok(())
}

/// Ten updates of models of random weights: time, work and memory.
pub(crate) fn shapes(check: &mut Check) -> Outcome {
    let llama =
        |hidden: usize, layers: usize, heads: usize, keys: usize, inner: usize, vocabulary: usize, tied: bool| {
            json!({
                "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary,
                "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": tied,
            })
        };
    if check.small {
        let tiny = llama(64, 2, 4, 2, 128, 300, true);
        train(check, "tiny, bf16", &tiny, Held::Bf16, 2, 64, 1.0)?;
        let tiny = llama(64, 2, 4, 2, 128, 300, false);
        train(check, "tiny, NF4", &tiny, Held::Nf4, 2, 64, 1.0)?;
        return train(check, "tiny, NF4 held in bf16", &tiny, Held::Dequantized, 2, 64, 1.0);
    }
    let peak = product_peak(check)?;
    eprintln!("  products of 8192: {:.0} TFLOP/s", peak / 1e12);
    let small = llama(2048, 16, 32, 8, 8192, 128_256, true);
    train(check, "1B shape, bf16", &small, Held::Bf16, 32, 4096, peak)?;
    let large = llama(4096, 32, 32, 8, 14_336, 128_256, false);
    train(check, "8B shape, NF4", &large, Held::Nf4, 32, 4096, peak)?;
    // what the pool of the runs before holds is not free for others, and is for this one
    let free = free_memory(&check.device).map_err(text)? + peak_memory(&check.device, false).map_err(text)?;
    if free < 60 << 30 {
        eprintln!(
            "  8B shape, NF4 held in bf16: left out, of 60 GiB only {:.0} are there",
            free as f64 / (1u64 << 30) as f64
        );
        return Ok(());
    }
    train(check, "8B shape, NF4 held in bf16", &large, Held::Dequantized, 32, 8192, peak)
}

/// What a model's layers are held as.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    Bf16,
    /// In blocks, dequantized a layer at a time.
    Nf4,
    /// NF4 in bf16, as where the plan has room for all of them.
    Dequantized,
}

/// Operations a second of a large product of random bf16 numbers.
fn product_peak(check: &Check) -> Outcome<f64> {
    const SIDE: usize = 8192;
    let random = || Tensor::randn(0f32, 1.0, (SIDE, SIDE), &check.device)?.to_dtype(DType::BF16);
    let (x, weight) = (random().map_err(text)?, Weight::Dense(random().map_err(text)?));
    let mut best = 0.0f64;
    for _ in 0..5 {
        peak_memory(&check.device, false).map_err(text)?;
        let started = Instant::now();
        for _ in 0..4 {
            linear::apply(&x, &weight).map_err(text)?;
        }
        // asking for memory waits for the device
        peak_memory(&check.device, false).map_err(text)?;
        best = best.max(4.0 * 2.0 * (SIDE as f64).powi(3) / started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn train(
    check: &mut Check,
    name: &str,
    config: &Value,
    held: Held,
    pairs: usize,
    budget: usize,
    peak: f64,
) -> Outcome {
    const UPDATES: usize = 10;
    const BETA: f64 = 0.1;
    let mut config = family::from_json(Path::new("config.json"), config.clone()).map_err(text)?;
    config.quant = if held == Held::Bf16 { Quant::None } else { Quant::Nf4 };
    peak_memory(&check.device, true).map_err(text)?;
    let free = free_memory(&check.device).map_err(text)?;
    let mut decoder = random_decoder(config.clone(), DType::BF16, &check.device).map_err(text)?;
    if held == Held::Dequantized {
        decoder = decoder.to_device(&check.device, DType::BF16, 0).map_err(text)?;
        config.quant = Quant::None;
        // what was there before is no longer
        peak_memory(&check.device, true).map_err(text)?;
    }
    let lora = LoraConfig { rank: 16, ..LoraConfig::default() };
    let modules = config.modules();
    let adapters = adapter::new(&lora, &modules, 1, DType::F32, &check.device).map_err(text)?;
    let mut model = Model::new(decoder, adapters).map_err(text)?;
    let mut optimizer = AdamW::new(model.adapters()).map_err(text)?;

    // lengths as UltraFeedback's: a prompt of about 200 tokens, completions of about 250
    let mut draw = |least: usize, most: usize| least + (check.rng.next_u64() as usize) % (most - least);
    let scale = if check.small { 40 } else { 1 };
    let lengths: Vec<_> = (0..pairs)
        .map(|_| (draw(40, 400) / scale + 1, draw(80, 440) / scale + 2, draw(80, 440) / scale + 2))
        .collect();
    let (mut batches, mut group, mut rows) = (Vec::new(), Vec::new(), 0);
    for pair in lengths {
        let more = pair.0 + pair.1 + pair.2 - 2;
        if rows + more > budget && !group.is_empty() {
            batches.push(batch(check, &std::mem::take(&mut group), config.vocab_size).0);
            rows = 0;
        }
        rows += more;
        group.push(pair);
    }
    batches.push(batch(check, &group, config.vocab_size).0);
    let sums = |scores: &[dpo_lora::ops::completion_logps::TokenScore], batch: &Packed| -> Vec<f64> {
        batch.spans.iter().map(|span| scores[span.clone()].iter().map(|score| score.logp).sum()).collect()
    };
    let mut references = Vec::new();
    for batch in &batches {
        let scores = model.forward(batch, Adapter::Off, Keep::Scores).map_err(text)?.scores;
        references.push(sums(&scores, batch));
    }
    let saved = vec![Saved::All; config.num_layers()];
    let mut losses = Vec::new();
    let mut seconds = Vec::new();
    for _ in 0..UPDATES {
        let started = Instant::now();
        let (mut gradients, mut loss) = (Gradients::default(), 0.0);
        for (batch, reference) in batches.iter().zip(&references) {
            let keep = Keep::Activations { dropout_key: 0, saved: &saved };
            let forward = model.forward(batch, Adapter::On, keep).map_err(text)?;
            let logps = sums(&forward.scores, batch);
            let mut slopes = vec![0.0; batch.targets.len()];
            for (i, logps) in logps.chunks(2).enumerate() {
                let margin = BETA * ((logps[0] - reference[2 * i]) - (logps[1] - reference[2 * i + 1]));
                loss += (1.0 + (-margin).exp()).ln() / pairs as f64;
                let slope = BETA / (1.0 + margin.exp()) / pairs as f64;
                slopes[batch.spans[2 * i].clone()].fill(-slope);
                slopes[batch.spans[2 * i + 1].clone()].fill(slope);
            }
            let activations = forward.activations.ok_or("nothing was kept")?;
            model.backward(batch, activations, &slopes, &mut gradients).map_err(text)?;
        }
        let mut gradients = gradients.in_order(model.adapters()).map_err(text)?;
        optimizer::clip(&mut gradients, 1.0).map_err(text)?;
        let rate = Rate { learning_rate: 2e-4, loraplus_ratio: 1.0, weight_decay: 0.0 };
        let updated = optimizer.step(model.adapters(), &gradients, rate).map_err(text)?;
        model.replace(updated).map_err(text)?;
        peak_memory(&check.device, false).map_err(text)?;
        seconds.push(started.elapsed().as_secs_f64());
        losses.push(loss);
    }
    let taken = peak_memory(&check.device, false).map_err(text)?;
    // the first updates choose cuBLAS's kernels and fill the pool of memory
    let steady = &mut seconds[UPDATES / 2..];
    steady.sort_unstable_by(f64::total_cmp);
    let median = steady[steady.len() / 2];
    let tokens: usize = batches.iter().map(|batch| batch.tokens).sum();
    let load = Load {
        rows: batches.iter().map(|batch| batch.ids.len()).sum::<usize>() as f64,
        scored: batches.iter().map(|batch| batch.targets.len()).sum::<usize>() as f64,
        pairs: batches.iter().map(|batch| batch.segments.pairs()).sum::<u64>() as f64,
        skipped: 0.0,
    };
    let mut shape = Shape::new(&config, &vec![16; modules.len()]);
    shape.on_gpu = true;
    let rows = |of: fn(&Packed) -> usize| batches.iter().map(of).max().unwrap_or(0);
    let largest = Rows { all: rows(|batch| batch.ids.len()), scored: rows(|batch| batch.targets.len()) };
    // weights, gradients, two moments, and what an update has in one buffer each
    let adapters = 4 * shape.adapter_parameters();
    let planned = shape.base_bytes() + 7 * adapters + shape.training(&saved, largest).total();
    let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
    let work = shape.training_work(load).total();
    eprintln!(
        "  {name}: {median:.3} s an update of {pairs} pairs, {:.0} tokens/s, {:.1} TFLOP/s ({:.0} % of the product's); \
         peak {:.2} GiB of {:.2} planned, {:.2} free at the start; loss {:.4} to {:.4}",
        tokens as f64 / median,
        work / median / 1e12,
        100.0 * work / median / peak,
        gib(taken),
        gib(planned),
        gib(free),
        losses[0],
        losses[UPDATES - 1],
    );
    // the policy begins as the reference, to the bit
    check.note(format!("{name}: first loss less ln 2"), (losses[0] - std::f64::consts::LN_2).abs(), 1e-9);
    check.note(format!("{name}: last loss over the first"), losses[UPDATES - 1] / losses[0], 0.999);
    check.note(format!("{name}: peak memory over the plan"), taken as f64 / planned as f64, 1.0);
    if held != Held::Dequantized {
        check.note(format!("{name}: peak memory over 24 GiB"), gib(taken) / 24.0, 1.0);
    }
    Ok(())
}
