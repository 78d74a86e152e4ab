//! The whole decoder against finite differences and against itself: shared prompts, packing, cache, composed ops.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use serde_json::json;

use super::generate::{Continued, End, Generator, Request, Sampling, Stop};
use super::layer::LayerCache;
use super::memory::Saved;
use super::*;
use crate::adapter::{self, LoraConfig, Targets, peft};
use crate::gguf::tests::Writer;
use crate::gguf::{GgufFile, Value};
use crate::ops::check::{close, composed, finite_difference, normal};
use crate::ops::completion_logps::TokenScore;
use crate::progress::Console;
use crate::quant::Kept;
use crate::quant::ggml::BlockType;

/// A tiny model: head width times heads is not the hidden size, so that no transposed matrix would fit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiny {
    pub(super) key_value_heads: usize,
    pub(super) tied: bool,
    pub(super) bias: bool,
}

pub(super) const GROUPED: Tiny = Tiny { key_value_heads: 2, tied: false, bias: false };
const TIED_WITH_BIAS: Tiny = Tiny { key_value_heads: 1, tied: true, bias: true };
const VOCABULARY: usize = 11;

impl Tiny {
    pub(super) fn config_json(self) -> serde_json::Value {
        json!({
            "model_type": "llama", "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": self.key_value_heads, "head_dim": 4,
            "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 100.0,
            "tie_word_embeddings": self.tied, "attention_bias": self.bias, "mlp_bias": self.bias,
        })
    }

    /// Random weights by Hugging Face's names, large enough that attention and the MLP are far from linear.
    pub(super) fn weights(self) -> BTreeMap<String, Tensor> {
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, 6]),
            ("model.norm.weight".to_owned(), vec![6]),
        ];
        if !self.tied {
            shapes.push(("lm_head.weight".to_owned(), vec![VOCABULARY, 6]));
        }
        let kv = 4 * self.key_value_heads;
        for layer in 0..2 {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![6]));
            }
            let linears = [
                ("self_attn.q_proj", 16, 6),
                ("self_attn.k_proj", kv, 6),
                ("self_attn.v_proj", kv, 6),
                ("self_attn.o_proj", 6, 16),
                ("mlp.gate_proj", 5, 6),
                ("mlp.up_proj", 5, 6),
                ("mlp.down_proj", 6, 5),
            ];
            for (name, outputs, inputs) in linears {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![outputs, inputs]));
                if self.bias {
                    shapes.push((format!("model.layers.{layer}.{name}.bias"), vec![outputs]));
                }
            }
        }
        let random = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
            let tensor = (normal(seed as u64, shape).expect("made") * 0.5).expect("scaled");
            let centre = if name.contains("norm") { 1.0 } else { 0.0 };
            (name, (tensor + centre).expect("moved"))
        };
        shapes.into_iter().enumerate().map(random).collect()
    }

    /// Writes a model folder.
    pub(super) fn write(self, folder: &Path) {
        let weights: Vec<_> = self.weights().into_iter().collect();
        let weights = peft::serialize(&weights).expect("serialised");
        std::fs::write(folder.join("model.safetensors"), weights).expect("written");
        std::fs::write(folder.join("config.json"), self.config_json().to_string()).expect("written");
    }

    fn decoder(self, dtype: DType) -> Decoder {
        let folder = tempfile::tempdir().expect("a folder");
        self.write(folder.path());
        let config = family::read_config(folder.path()).expect("a config");
        let files = WeightFiles::open(folder.path()).expect("weights");
        files.decoder(config, dtype, &Console::silent()).expect("they fit")
    }
}

/// Adapters of rank 2 on every module, `B` not zero.
fn adapters(decoder: &Decoder, dropout: f64) -> Adapters {
    let config = LoraConfig { rank: 2, alpha: 3.0, dropout, targets: Targets::AllLinear, ..LoraConfig::default() };
    let modules = decoder.config().modules();
    let mut adapters = adapter::new(&config, &modules, 1, decoder.dtype(), &Device::Cpu).expect("made");
    let random = |(seed, (_, tensor)): (usize, (String, &Tensor))| {
        let values =
            normal(100 + seed as u64, tensor.dims()).and_then(|x| x * 0.4).and_then(|x| x.to_dtype(decoder.dtype()));
        values.expect("made")
    };
    let tensors: Vec<_> = adapters.tensors().enumerate().map(random).collect();
    adapters.replace(tensors).expect("replaced");
    adapters
}

/// A prompt and two completions.
struct Pair {
    key: u64,
    prompt: Vec<u32>,
    branches: [Vec<u32>; 2],
}

/// Pairs of the given lengths; every token occurs.
fn pairs(lengths: &[(usize, usize, usize)]) -> Vec<Pair> {
    let tokens = |seed: usize, length: usize| {
        (0..length).map(|i| ((seed * 7 + i * i + 3 * i) % VOCABULARY) as u32).collect::<Vec<_>>()
    };
    let pair = |(i, &(prompt, a, b)): (usize, &(usize, usize, usize))| Pair {
        key: i as u64,
        prompt: tokens(3 * i, prompt),
        branches: [tokens(3 * i + 1, a), tokens(3 * i + 2, b)],
    };
    lengths.iter().enumerate().map(pair).collect()
}

const SHORT: [(usize, usize, usize); 3] = [(3, 4, 2), (1, 1, 5), (4, 3, 3)];

/// How pairs become rows.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Layout {
    shared: bool,
    prompt_span: PromptSpan,
}

const SHARED: Layout = Layout { shared: true, prompt_span: PromptSpan::No };
const UNSHARED: Layout = Layout { shared: false, ..SHARED };

fn pack<'p>(pairs: impl IntoIterator<Item = &'p Pair>, layout: Layout) -> Packed {
    let mut packer = Packer::default();
    for Pair { key, prompt, branches: [a, b] } in pairs {
        if layout.shared {
            packer.push(*key, prompt, &[a, b], layout.prompt_span);
        } else {
            packer.push(*key, prompt, &[a], layout.prompt_span);
            packer.push(*key, prompt, &[b], PromptSpan::No);
        }
    }
    packer.finish()
}

const DROPOUT_KEY: u64 = 9;
const ALL: [Saved; 2] = [Saved::All; 2];

fn forward(decoder: &Decoder, adapters: &Adapters, batch: &Packed) -> Result<Forward> {
    decoder.forward(batch, Some(adapters), Keep::Activations { dropout_key: DROPOUT_KEY, saved: &ALL })
}

/// A slope for each span, as a loss over sums of log-probabilities has, by the span's first target: it goes with the
/// span wherever that is packed.
fn slopes(batch: &Packed) -> Vec<f64> {
    let mut slopes = vec![0.0; batch.targets.len()];
    for span in &batch.spans {
        let (length, first) = (span.len() as f64, f64::from(batch.targets.get(span.start).copied().unwrap_or(0)));
        slopes[span.clone()].fill((length + 2.0 * first).sin());
    }
    slopes
}

fn weighted(scores: &[TokenScore], slopes: &[f64]) -> f64 {
    scores.iter().zip(slopes).map(|(score, slope)| slope * score.logp).sum()
}

/// What is computed again is computed by the same operators from the same inputs.
#[test]
fn whatever_a_layer_keeps_the_gradients_are_the_same_to_the_bit() -> Result<()> {
    for (tiny, dropout) in [(GROUPED, 0.0), (TIED_WITH_BIAS, 0.4)] {
        let decoder = tiny.decoder(DType::F32);
        let adapters = adapters(&decoder, dropout);
        let batch = pack(&pairs(&LONG), SHARED);
        let gradients = |saved: [Saved; 2]| {
            let keep = Keep::Activations { dropout_key: DROPOUT_KEY, saved: &saved };
            let activations = decoder.forward(&batch, Some(&adapters), keep)?.activations.expect("kept");
            let mut sum = Gradients::default();
            decoder.backward(&batch, &adapters, activations, &slopes(&batch), &mut sum)?;
            Ok::<_, candle_core::Error>(sum.in_order(&adapters).expect("every tensor has a gradient"))
        };
        let expected = gradients(ALL)?;
        for low in [Saved::WithoutGateUp, Saved::AttentionAndInput, Saved::Input] {
            for saved in [[low, Saved::All], [low; 2]] {
                all_close(&gradients(saved)?, &expected, 0.0)?;
            }
        }
    }
    Ok(())
}

/// Nothing is kept below the lowest layer with an adapter, and its gradients do not change for it.
#[test]
fn layers_below_the_lowest_adapter_are_left_out_of_the_backward_pass() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F64);
    let batch = pack(&pairs(&SHORT), SHARED);
    let all = adapters(&decoder, 0.0);
    let targets = Targets::Pattern(r"model\.layers\.1\..*".into());
    let config = LoraConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets, ..LoraConfig::default() };
    let mut upper = adapter::new(&config, &decoder.config().modules(), 1, DType::F64, &Device::Cpu).expect("made");
    let values: Vec<Tensor> = all.tensors().skip(14).map(|(_, tensor)| tensor.clone()).collect();
    upper.replace(values.clone()).expect("replaced");
    // the same function: adapters below that are zero
    let mut zero_below = all.clone();
    let zeros = all.tensors().take(14).map(|(_, tensor)| tensor.zeros_like()).collect::<Result<Vec<_>>>()?;
    zero_below.replace(zeros.into_iter().chain(values)).expect("replaced");
    let expected = gradients(&decoder, &zero_below, &batch)?;
    all_close(&gradients(&decoder, &upper, &batch)?, &expected[14..], 1e-13)
}

fn add_gradients(decoder: &Decoder, adapters: &Adapters, batch: &Packed, sum: &mut Gradients) -> Result<()> {
    let activations = forward(decoder, adapters, batch)?.activations.expect("kept");
    decoder.backward(batch, adapters, activations, &slopes(batch), sum)
}

fn gradients(decoder: &Decoder, adapters: &Adapters, batch: &Packed) -> Result<Vec<Tensor>> {
    let mut sum = Gradients::default();
    add_gradients(decoder, adapters, batch, &mut sum)?;
    Ok(sum.in_order(adapters).expect("every tensor has a gradient"))
}

fn all_close(found: &[Tensor], expected: &[Tensor], tolerance: f64) -> Result<()> {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).try_for_each(|(found, expected)| close(found, expected, tolerance))
}

/// Every element of every adapter tensor.
fn check_gradients(tiny: Tiny, layout: Layout, dropout: f64) -> Result<()> {
    let decoder = tiny.decoder(DType::F64);
    let adapters = adapters(&decoder, dropout);
    let pairs = pairs(&SHORT);
    let batch = pack(&pairs, layout);
    let slopes = slopes(&batch);
    let gradients = gradients(&decoder, &adapters, &batch)?;
    let tensors: Vec<Tensor> = adapters.tensors().map(|(_, tensor)| tensor.clone()).collect();
    for (i, gradient) in gradients.iter().enumerate() {
        finite_difference(&tensors[i], gradient, |moved| {
            let mut tensors = tensors.clone();
            tensors[i] = moved.clone();
            let mut adapters = adapters.clone();
            adapters.replace(tensors).expect("replaced");
            let scores = forward(&decoder, &adapters, &batch)?.scores;
            Tensor::new(weighted(&scores, &slopes), &Device::Cpu)
        })?;
    }
    Ok(())
}

#[test]
fn adapter_gradients_agree_with_finite_differences() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        for layout in [SHARED, UNSHARED] {
            check_gradients(tiny, layout, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn adapter_gradients_agree_with_finite_differences_when_prompts_are_scored() -> Result<()> {
    for layout in [SHARED, UNSHARED] {
        check_gradients(GROUPED, Layout { prompt_span: PromptSpan::Yes, ..layout }, 0.0)?;
    }
    Ok(())
}

#[test]
fn adapter_gradients_agree_with_finite_differences_under_dropout() -> Result<()> {
    check_gradients(GROUPED, UNSHARED, 0.4)?;
    check_gradients(TIED_WITH_BIAS, SHARED, 0.4)
}

/// Two pairs of more rows than one tile of attention, beside short ones.
const LONG: [(usize, usize, usize); 4] = [(70, 5, 80), (3, 4, 2), (2, 130, 1), (66, 66, 66)];

/// 1e-12 is a few thousand roundings of f64; the two layouts differ in nothing else.
#[test]
fn a_shared_prompt_is_the_same_as_two() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        let decoder = tiny.decoder(DType::F64);
        let adapters = adapters(&decoder, 0.0);
        let pairs = pairs(&LONG);
        let (shared, unshared) = (pack(&pairs, SHARED), pack(&pairs, UNSHARED));
        assert!(shared.ids.len() < unshared.ids.len());
        assert_eq!((&shared.targets, &shared.spans), (&unshared.targets, &unshared.spans));
        let (a, b) = (forward(&decoder, &adapters, &shared)?, forward(&decoder, &adapters, &unshared)?);
        for (a, b) in a.scores.iter().zip(&b.scores) {
            assert!((a.logp - b.logp).abs() < 1e-12 && (a.entropy - b.entropy).abs() < 1e-12);
        }
        let gradients = |batch| gradients(&decoder, &adapters, batch);
        all_close(&gradients(&shared)?, &gradients(&unshared)?, 1e-12)?;
    }
    Ok(())
}

/// Under dropout too: a row's mask goes by its sequence and position, not by its place in the batch.
#[test]
fn neither_order_nor_micro_batches_change_anything() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F64);
    for (dropout, layout) in [(0.0, SHARED), (0.4, SHARED), (0.4, UNSHARED)] {
        let adapters = adapters(&decoder, dropout);
        let pairs = pairs(&LONG);
        let together = pack(&pairs, layout);
        let expected = gradients(&decoder, &adapters, &together)?;
        let expected_scores = forward(&decoder, &adapters, &together)?.scores;

        let reversed = pack(pairs.iter().rev(), layout);
        let scores = forward(&decoder, &adapters, &reversed)?.scores;
        for (i, spans) in reversed.spans.chunks_exact(2).rev().enumerate() {
            for (span, expected) in spans.iter().zip(&together.spans[2 * i..]) {
                for (a, b) in scores[span.clone()].iter().zip(&expected_scores[expected.clone()]) {
                    assert!((a.logp - b.logp).abs() < 1e-12);
                }
            }
        }
        all_close(&gradients(&decoder, &adapters, &reversed)?, &expected, 1e-12)?;

        let mut sum = Gradients::default();
        for pair in &pairs {
            add_gradients(&decoder, &adapters, &pack([pair], layout), &mut sum)?;
        }
        all_close(&sum.in_order(&adapters).expect("every tensor has a gradient"), &expected, 1e-12)?;
    }
    Ok(())
}

#[test]
fn dropout_acts_in_training_only_and_by_its_key() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F64);
    let (with, without) = (adapters(&decoder, 0.4), adapters(&decoder, 0.0));
    let batch = pack(&pairs(&SHORT), SHARED);
    let scores = |adapters: &Adapters, keep| {
        Ok::<_, candle_core::Error>(decoder.forward(&batch, Some(adapters), keep)?.scores)
    };
    let training = |dropout_key| Keep::Activations { dropout_key, saved: &ALL };
    assert_eq!(scores(&with, Keep::Scores)?, scores(&without, Keep::Scores)?);
    assert_eq!(scores(&with, training(1))?, scores(&with, training(1))?);
    assert_ne!(scores(&with, training(1))?, scores(&with, training(2))?);
    assert_ne!(scores(&with, training(1))?, scores(&without, training(1))?);
    Ok(())
}

#[test]
fn the_composed_ops_make_the_same_decoder() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        let decoder = tiny.decoder(DType::F64);
        let adapters = adapters(&decoder, 0.3);
        let batch = pack(&pairs(&SHORT), Layout { prompt_span: PromptSpan::Yes, ..SHARED });
        let scores = || Ok(forward(&decoder, &adapters, &batch)?.scores);
        for (kernel, plain) in scores()?.iter().zip(composed(scores)?) {
            assert!((kernel.logp - plain.logp).abs() < 1e-12);
        }
        let gradients = || gradients(&decoder, &adapters, &batch);
        all_close(&gradients()?, &composed(gradients)?, 1e-12)?;
    }
    Ok(())
}

/// Whole, token by token, or in pieces; and as [`Decoder::forward`] scores it.
#[test]
fn a_cache_changes_nothing() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        let decoder = tiny.decoder(DType::F64);
        let adapters = adapters(&decoder, 0.0);
        let ids = &pairs(&[(80, 1, 1)])[0].prompt;
        let width = 4 * tiny.key_value_heads;
        let logits = |pieces: &[usize]| {
            let empty = || Tensor::zeros((ids.len(), width), DType::F64, &Device::Cpu);
            let cache =
                [LayerCache { keys: empty()?, values: empty()? }, LayerCache { keys: empty()?, values: empty()? }];
            let (mut filled, mut logits) = (0, None);
            for &piece in pieces {
                let sequence = Continued { ids: &ids[..filled + piece], filled, start: 0 };
                logits = Some(decoder.step(&[sequence], &cache, Some(&adapters))?.squeeze(0)?);
                filled += piece;
            }
            assert_eq!(filled, ids.len());
            Ok::<_, candle_core::Error>(logits.expect("at least one piece"))
        };
        let whole = logits(&[80])?;
        close(&logits(&[1; 80])?, &whole, 1e-12)?;
        close(&logits(&[66, 1, 12, 1])?, &whole, 1e-12)?;

        let tokens: Vec<u32> = (0..VOCABULARY as u32).collect();
        let mut packer = Packer::default();
        packer.push(0, ids, &tokens.chunks(1).collect::<Vec<_>>(), PromptSpan::No);
        let scores = decoder.forward(&packer.finish(), Some(&adapters), Keep::Scores)?.scores;
        let logps: Vec<f64> = scores.iter().map(|score| score.logp).collect();
        let log_sum_exp = whole.log_sum_exp(0)?;
        close(&whole.broadcast_sub(&log_sum_exp)?, &Tensor::new(logps, &Device::Cpu)?, 1e-12)?;
    }
    Ok(())
}

#[test]
fn an_answer_ends_at_the_models_longest_position() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F32);
    let adapters = adapters(&decoder, 0.0);
    let model = Model::new(decoder, adapters)?;
    let stop = Stop { tokens: &[], max_new_tokens: 50 };
    for (prompt, expected) in [(250, 6), (256, 0), (300, 0)] {
        let answer = model.generate(&pairs(&[(prompt, 1, 1)])[0].prompt, Adapter::On, &stop)?;
        assert_eq!(answer.len(), expected);
    }
    Ok(())
}

/// Answers of several sizes and settings, generated together in so many slots.
fn answers(model: &Model, slots: usize) -> Vec<(Vec<u32>, Option<End>)> {
    let sampled = Sampling { temperature: 1.3, top_p: 0.9, top_k: 12, min_p: 0.01, repetition_penalty: 1.2 };
    let mut requests: Vec<Request> = [(3, 9), (40, 20), (1, 1), (17, 30), (80, 2), (5, 25), (64, 12)]
        .into_iter()
        .enumerate()
        .map(|(i, (length, max_new_tokens))| Request {
            prompt: pairs(&[(length, 1, 1)])[0].prompt.clone(),
            stop_tokens: if i % 3 == 1 { vec![7] } else { Vec::new() },
            max_new_tokens,
            sampling: if i % 2 == 0 { sampled } else { Sampling::default() },
            seed: i as u64,
        })
        .collect();
    let mut answers = vec![(Vec::new(), None); requests.len()];
    let mut generator = Generator::new(model, Adapter::On, slots, 100).expect("made");
    let mut waiting = requests.drain(..);
    while answers.iter().any(|(_, end)| end.is_none()) {
        while generator.has_room() {
            let Some(request) = waiting.next() else { break };
            assert!(generator.add(request).is_some());
        }
        let step = generator.step(|next| {
            let (ids, end) = &mut answers[next.key as usize];
            ids.extend(next.token);
            *end = next.end;
            true
        });
        step.expect("computed");
    }
    assert!(generator.is_idle());
    answers
}

/// To the bit: whatever else is generated in the same steps, and in whichever slot.
#[test]
fn an_answer_is_the_same_whatever_is_generated_beside_it() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        let decoder = tiny.decoder(DType::F32);
        let adapters = adapters(&decoder, 0.0);
        let model = Model::new(decoder, adapters)?;
        let alone = answers(&model, 1);
        assert!(alone.iter().map(|(ids, _)| ids.len()).sum::<usize>() > 50, "{alone:?}");
        for slots in [2, 3, 20] {
            assert_eq!(answers(&model, slots), alone, "{slots} slots");
        }
    }
    Ok(())
}

#[test]
fn what_ends_before_a_pass_that_fails_is_at_its_end() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F32);
    let adapters = adapters(&decoder, 0.0);
    let model = Model::new(decoder, adapters)?;
    let request = |prompt: &[u32], max_new_tokens| Request {
        prompt: prompt.to_vec(),
        stop_tokens: Vec::new(),
        max_new_tokens,
        sampling: Sampling::default(),
        seed: 0,
    };
    let mut generator = Generator::new(&model, Adapter::On, 2, 16)?;
    generator.add(request(&[1, 2], 1)).expect("a place");
    let broken = generator.add(request(&[1, VOCABULARY as u32], 1)).expect("a place");
    let mut ends = Vec::new();
    let mut step = |generator: &mut Generator<'_>| {
        generator.step(|next| {
            ends.push(next.end);
            true
        })
    };
    assert!(step(&mut generator).is_err(), "a token outside the vocabulary");
    assert!(generator.has_room(), "the first answer is whole, and its place is free");
    assert!(step(&mut generator).is_err());
    generator.end(broken);
    assert!(generator.is_idle());
    step(&mut generator)?;
    assert_eq!(ends, [Some(End::Length)]);
    Ok(())
}

/// At the start of every run the policy is the reference: the loss is exactly what its formula gives at zero.
#[test]
fn with_b_zero_the_policy_is_the_reference_bit_for_bit() -> Result<()> {
    for tiny in [GROUPED, TIED_WITH_BIAS] {
        let decoder = tiny.decoder(DType::F32);
        let config =
            LoraConfig { rank: 2, alpha: 3.0, dropout: 0.0, targets: Targets::AllLinear, ..LoraConfig::default() };
        let adapters = adapter::new(&config, &decoder.config().modules(), 1, DType::F32, &Device::Cpu).expect("made");
        let batch = pack(&pairs(&LONG), SHARED);
        let on = forward(&decoder, &adapters, &batch)?.scores;
        assert_eq!(on, decoder.forward(&batch, None, Keep::Scores)?.scores);
    }
    Ok(())
}

/// Policy and reference in one pass are each what they are alone; dropout is the policy's.
#[test]
fn policy_and_reference_share_a_pass_and_nothing_else() -> Result<()> {
    let decoder = GROUPED.decoder(DType::F32);
    let batch = pack(&pairs(&LONG), SHARED);
    let keep = Keep::Activations { dropout_key: DROPOUT_KEY, saved: &ALL };
    let policy = Model::new(decoder.clone(), adapters(&decoder, 0.3))?;
    let continued = policy.clone().with_reference(policy.adapters().clone())?;
    for model in [policy, continued] {
        let gradients = |forward: Forward| {
            let mut sum = Gradients::default();
            model.backward(&batch, forward.activations.expect("kept"), &slopes(&batch), &mut sum)?;
            Ok::<_, candle_core::Error>(sum.in_order(model.adapters()).expect("every tensor has a gradient"))
        };
        let (both, reference) = model.forward_with_reference(&batch, Adapter::On, keep)?;
        let alone = model.forward(&batch, Adapter::On, keep)?;
        assert_eq!(both.scores, alone.scores);
        assert_eq!(reference, model.forward(&batch, Adapter::Reference, Keep::Scores)?.scores);
        assert_ne!(both.scores, reference);
        all_close(&gradients(both)?, &gradients(alone)?, 0.0)?;
    }
    Ok(())
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error() {
    let decoder = GROUPED.decoder(DType::F32);
    for (prompt, completion) in [([11], [1]), ([1], [11])] {
        let mut packer = Packer::default();
        packer.push(0, &prompt, &[&completion], PromptSpan::No);
        let error = decoder.forward(&packer.finish(), None, Keep::Scores).expect_err("11 is one too many");
        assert!(error.to_string().contains("token 11 is outside the model's vocabulary of 11"), "{error}");
    }
}

/// It would silently never train.
#[test]
fn a_trainable_tensor_without_a_gradient_is_named() {
    let decoder = GROUPED.decoder(DType::F32);
    let missing = Gradients::default().in_order(&adapters(&decoder, 0.0)).expect_err("none has one");
    assert!(missing.to_string().contains("`model.layers.0.self_attn.q_proj` got no gradient"), "{missing}");
}

/// A model of Llama's architecture with rows wide enough for blocks of 256, under Hugging Face's names.
fn wide() -> (serde_json::Value, BTreeMap<String, Tensor>) {
    let (d, f, v, heads, kv, e) = (256, 256, 40, 4, 2, 64);
    let config = json!({
        "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": e, "vocab_size": v,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 100.0,
    });
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![v, d]),
        ("model.norm.weight".to_owned(), vec![d]),
        ("lm_head.weight".to_owned(), vec![v, d]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![d]),
            ("post_attention_layernorm", vec![d]),
            ("self_attn.q_proj", vec![heads * e, d]),
            ("self_attn.k_proj", vec![kv * e, d]),
            ("self_attn.v_proj", vec![kv * e, d]),
            ("self_attn.o_proj", vec![d, heads * e]),
            ("mlp.gate_proj", vec![f, d]),
            ("mlp.up_proj", vec![f, d]),
            ("mlp.down_proj", vec![d, f]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let random = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let scale = if name.contains("norm") { 0.3 } else { 0.08 };
        let tensor = (normal(seed as u64, shape).expect("made") * scale).expect("scaled");
        let centre = if name.contains("norm") { 1.0 } else { 0.0 };
        (name, (tensor + centre).and_then(|t| t.to_dtype(DType::F32)).expect("moved"))
    };
    (config, shapes.into_iter().enumerate().map(random).collect())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32")
}

/// The same model as llama.cpp's converter would write it, matrices in blocks of `kind`.
fn as_gguf(config: &serde_json::Value, weights: &BTreeMap<String, Tensor>, kind: BlockType) -> Vec<u8> {
    let number = |key: &str| Value::Unsigned(config[key].as_u64().expect("a size"));
    let mut writer = Writer::default()
        .value("general.architecture", Value::Text("llama".into()))
        .value("llama.embedding_length", number("hidden_size"))
        .value("llama.feed_forward_length", number("intermediate_size"))
        .value("llama.block_count", number("num_hidden_layers"))
        .value("llama.attention.head_count", number("num_attention_heads"))
        .value("llama.attention.head_count_kv", number("num_key_value_heads"))
        .value("llama.context_length", number("max_position_embeddings"))
        .value("llama.rope.freq_base", Value::Float(100.0))
        .value("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    for (name, tensor) in weights {
        let name = name
            .replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
            .replace("model.layers", "blk")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "");
        let tensor = match name.contains("attn_q") || name.contains("attn_k") {
            // [heads, two halves, 32, columns]: the halves' rows between each other
            true => {
                let (rows, columns) = tensor.dims2().expect("a matrix");
                let turned =
                    tensor.reshape((rows / 64, 2, 32, columns)).and_then(|t| t.transpose(1, 2)?.contiguous());
                turned.and_then(|t| t.reshape((rows, columns))).expect("turned")
            }
            false => tensor.clone(),
        };
        let kind = if tensor.rank() == 1 { BlockType::F32 } else { kind };
        writer = writer.tensor(&name, tensor.dims(), kind, &values(&tensor));
    }
    writer.bytes()
}

/// Weights as a GGUF file has them are trained on exactly as f32 weights of the same values are.
#[test]
fn a_quantized_base_has_the_gradients_of_its_dequantized_weights() {
    let (config, weights) = wide();
    let place = tempfile::tempdir().expect("a folder");
    let file = place.path().join("model.gguf");
    for kind in [BlockType::F32, BlockType::Q8_0, BlockType::Q4K] {
        std::fs::write(&file, as_gguf(&config, &weights, kind)).expect("written");
        let gguf = GgufFile::open(&file).expect("a GGUF file");
        let quantized =
            gguf_decoder(&gguf, family::read_gguf(&gguf).expect("a decoder"), DType::F32).expect("weights");

        // the same blocks, dequantized, in a folder
        let dense = weights.iter().map(|(name, tensor)| {
            let dense = match *tensor.dims() {
                [rows, columns] => {
                    let kept = Kept::Blocks(kind).keep(rows, columns, values(tensor)).expect("kept");
                    kept.dense(DType::F32).expect("dense")
                }
                _ => tensor.clone(),
            };
            (name.clone(), dense)
        });
        let dense: Vec<_> = dense.collect();
        std::fs::write(place.path().join("model.safetensors"), peft::serialize(&dense).expect("serialised"))
            .expect("written");
        let of_json = family::from_json(Path::new("config.json"), config.clone()).expect("a decoder");
        let files = WeightFiles::open(place.path()).expect("weights");
        let dense = files.decoder(of_json, DType::F32, &Console::silent()).expect("they fit");
        assert_eq!(quantized.config().modules(), dense.config().modules());

        let results = [quantized, dense].map(|decoder| {
            let adapters = adapters(&decoder, 0.0);
            let model = Model::new(decoder, adapters).expect("made");
            let mut packer = Packer::default();
            packer.push(1, &[1, 2, 3, 4, 5], &[&[6, 7, 8, 9], &[10, 11, 12]], PromptSpan::No);
            packer.push(2, &[20, 21], &[&[22, 39, 0]], PromptSpan::No);
            let batch = packer.finish();
            let saved = [Saved::All; 2];
            let forward = model.forward(&batch, Adapter::On, Keep::Activations { dropout_key: 1, saved: &saved });
            let forward = forward.expect("computed");
            let mut gradients = Gradients::default();
            let slopes: Vec<f64> = (0..batch.targets.len()).map(|i| 0.3 + 0.1 * i as f64).collect();
            model.backward(&batch, forward.activations.expect("kept"), &slopes, &mut gradients).expect("computed");
            let logps: Vec<f64> = forward.scores.iter().map(|score| score.logp).collect();
            (logps, gradients.in_order(model.adapters()).expect("all"))
        });
        let [(logps, gradients), (dense_logps, dense_gradients)] = &results;
        for (a, b) in logps.iter().zip(dense_logps) {
            assert!((a - b).abs() < 1e-5, "{kind}: {a} {b}");
        }
        for (a, b) in gradients.iter().zip(dense_gradients) {
            let size = |t: &Tensor| values(t).iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let (difference, of) = (size(&(a - b).expect("one shape")), size(b));
            assert!(of > 1e-3 && difference < 1e-5 * of, "{kind}: {difference} of {of}");
        }
    }
}

/// What llama.cpp's own converter wrote, against the folder that it was converted from.
#[test]
fn a_real_gguf_file_is_the_folder_that_it_was_made_of() {
    let Some(real) = std::env::var_os("DPO_LORA_REAL").map(std::path::PathBuf::from) else {
        eprintln!("a_real_gguf_file_is_the_folder_that_it_was_made_of: skipped, DPO_LORA_REAL is not set");
        return;
    };
    let folder = real.join("stories260K");
    let files = WeightFiles::open(&folder).expect("weights");
    let config = family::read_config(&folder).expect("a decoder");
    let dense = files.decoder(config, DType::F32, &Console::silent()).expect("they fit");
    // q8_0 keeps seven bits of each weight, a hundredth of the logits
    for (name, tolerance) in [("stories260K-f32.gguf", 1e-5), ("stories260K-q8_0.gguf", 0.3)] {
        let file = GgufFile::open(&folder.join("reference").join(name)).expect("a GGUF file");
        let config = family::read_gguf(&file).expect("a decoder");
        assert_eq!(config.modules(), dense.config().modules());
        assert_eq!(config.ropes, dense.config().ropes);
        assert_eq!(config.rms_norm_eps, dense.config().rms_norm_eps);
        let gguf = gguf_decoder(&file, config, DType::F32).expect("weights");
        let prompt: Vec<u32> = (0..40).map(|i| 1 + i * 11 % 500).collect();
        let logits = |decoder: &Decoder| {
            let width = decoder.config().num_key_value_heads * decoder.config().head_dim;
            let empty = || Tensor::zeros((prompt.len(), width), DType::F32, &Device::Cpu).expect("made");
            let cache: Vec<_> =
                (0..decoder.config().num_layers()).map(|_| LayerCache { keys: empty(), values: empty() }).collect();
            let sequence = Continued { ids: &prompt, filled: 0, start: 0 };
            values(&decoder.step(&[sequence], &cache, None).expect("computed"))
        };
        let (found, expected) = (logits(&gguf), logits(&dense));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance, "{name}: {worst}");
    }
}
