//! Answers that base and policy gave: how far the policy is from the base, how long they are, whether they repeat.

use std::collections::HashSet;

use serde::Serialize;

use super::BATCH_ROWS;
use crate::model::packed::rows;
use crate::model::{Adapter, Model, Packer, PromptSpan};
use crate::ops::divergence;
use crate::progress::Console;
use crate::statistics::{Bootstrap, Clusters, Estimate, mean};

/// An answer as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sampled {
    /// Its prompt.
    pub prompt: Vec<u32>,
    /// The answer, without the token that ended it.
    pub ids: Vec<u32>,
    /// Whether it ended by itself.
    pub ended: bool,
}

/// How far the policy is from the base where it goes itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Distance {
    /// Nats a token.
    pub per_token: Estimate,
    /// Nats an answer.
    pub total: Estimate,
    /// Of each answer.
    pub totals: Vec<f64>,
}

impl Distance {
    /// `KL(policy ‖ base)` (or the adapter that training began from, where that is the reference) on answers that were
    /// sampled from the policy at temperature 1: for each answer
    ///
    /// ```text
    /// Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)),   y ~ π(·|x)
    /// ```
    ///
    /// over its tokens and, where it ended by itself, the token that ended it. Its mean is the KL of whole answers (the
    /// chain rule); with the exact divergence at every position its variance is lower than that of the log-ratios of the
    /// tokens that were drawn (it is their Rao–Blackwell form). Answers that were cut count as far as they go.
    ///
    /// One answer a prompt, prompts resampled.
    ///
    /// # Errors
    /// What candle returns.
    pub fn of(
        model: &Model,
        answers: &[Sampled],
        stop: u32,
        bootstrap: Bootstrap,
        console: &Console,
    ) -> candle_core::Result<Self> {
        let bar = console.count_bar("KL from the base", answers.len() as u64);
        let (mut totals, mut tokens) = (Vec::new(), Vec::new());
        let branch =
            |answer: &Sampled| answer.ids.iter().copied().chain(answer.ended.then_some(stop)).collect::<Vec<_>>();
        let mut waiting = answers.iter().map(|answer| (answer, branch(answer))).peekable();
        while waiting.peek().is_some() {
            let (mut packer, mut filled, mut taken) = (Packer::default(), 0, 0);
            while let Some((answer, branch)) = waiting.peek() {
                if branch.is_empty() {
                    // cut before its first token: it has no position
                    waiting.next();
                    continue;
                }
                let more = rows(answer.prompt.len(), &[branch.len()]);
                if filled > 0 && filled + more > BATCH_ROWS {
                    break;
                }
                packer.push(0, &answer.prompt, &[branch], PromptSpan::No);
                filled += more;
                taken += 1;
                waiting.next();
            }
            if taken == 0 {
                break;
            }
            let batch = packer.finish();
            let head = model.decoder().head();
            let hidden = |adapter| model.decoder().hidden(&batch, model.switched(adapter));
            let (policy, reference) = (hidden(Adapter::On)?, hidden(Adapter::Reference)?);
            let all = divergence::of_rows((&policy, head), (&reference, head))?;
            for span in &batch.spans {
                totals.push(all[span.clone()].iter().map(|one| one.kl).sum());
                tokens.push(span.len() as f64);
            }
            bar.advance(taken);
        }
        let clusters = Clusters::each(totals.len());
        Ok(Self {
            per_token: bootstrap.ratio(&totals, &tokens, &clusters),
            total: bootstrap.mean(&totals, &clusters),
            totals,
        })
    }
}

/// What answers look like, of one side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerSide {
    /// Mean tokens, without the one that ended it.
    pub tokens: f64,
    /// Share that did not end within the limit.
    pub truncated: f64,
    /// Share without a token.
    pub empty: f64,
    /// Whether they repeat.
    pub repetition: Repetition,
}

impl AnswerSide {
    fn of(answers: &[Sampled]) -> Self {
        let share = |holds: &dyn Fn(&Sampled) -> bool| {
            answers.iter().filter(|answer| holds(answer)).count() as f64 / answers.len().max(1) as f64
        };
        Self {
            tokens: mean(&answers.iter().map(|answer| answer.ids.len() as f64).collect::<Vec<_>>()),
            truncated: share(&|answer| !answer.ended),
            empty: share(&|answer| answer.ids.is_empty()),
            repetition: repetition(answers.iter().map(|answer| &answer.ids[..])),
        }
    }
}

/// Answers of both sides to the same prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// Of the base.
    pub base: AnswerSide,
    /// Of the policy.
    pub policy: AnswerSide,
    /// Tokens of the policy's answers minus those of the base's, prompt by prompt.
    pub longer: Estimate,
    /// Share of prompts that both answer with the same tokens.
    pub identical: f64,
}

impl Answers {
    /// Compares answers to the same prompts.
    #[must_use]
    pub fn of(base: &[Sampled], policy: &[Sampled], bootstrap: Bootstrap) -> Self {
        let longer: Vec<f64> =
            base.iter().zip(policy).map(|(base, policy)| policy.ids.len() as f64 - base.ids.len() as f64).collect();
        let same = base.iter().zip(policy).filter(|(base, policy)| base.ids == policy.ids).count();
        Self {
            base: AnswerSide::of(base),
            policy: AnswerSide::of(policy),
            longer: bootstrap.mean(&longer, &Clusters::each(longer.len())),
            identical: same as f64 / base.len().max(1) as f64,
        }
    }
}

/// How much of answers was said before, by token ids.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Repetition {
    /// Mean over answers of `1 − distinct / all` of their 4-grams; answers of fewer than four tokens repeat nothing. Near 0
    /// in prose, near 1 in a loop (`rep-4` of Welleck et al. 2019, <https://arxiv.org/abs/1908.04319>).
    pub repeated_4grams: f64,
    /// Distinct 1-grams of all answers, as a share of all (Li et al. 2015, <https://arxiv.org/abs/1510.03055>).
    pub distinct_1: f64,
    /// The same of 2-grams.
    pub distinct_2: f64,
}

/// Of answers as token ids.
#[must_use]
pub fn repetition<'a>(answers: impl Iterator<Item = &'a [u32]> + Clone) -> Repetition {
    let repeated: Vec<f64> = answers
        .clone()
        .map(|ids| match ids.len().checked_sub(3) {
            None | Some(0) => 0.0,
            Some(all) => 1.0 - ids.windows(4).collect::<HashSet<_>>().len() as f64 / all as f64,
        })
        .collect();
    let distinct = |n: usize| {
        let (mut seen, mut all) = (HashSet::new(), 0usize);
        for ids in answers.clone() {
            all += ids.windows(n).count();
            seen.extend(ids.windows(n));
        }
        seen.len() as f64 / all.max(1) as f64
    };
    Repetition { repeated_4grams: mean(&repeated), distinct_1: distinct(1), distinct_2: distinct(2) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Tensor};

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::model::generate::{End, Generator, Request, Sampling};
    use crate::model::{Base, Keep};
    use crate::quant::Quant;
    use crate::statistics::standard_error;

    /// The quickstart's base with an adapter that changes it somewhat.
    fn changed() -> Model {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart/model");
        let base = Base::local(&folder).expect("there");
        let config = base.config(Quant::None).expect("a config");
        let modules = config.modules();
        let (decoder, _) = base.load(config, &Console::silent()).expect("weights");
        let adapters = crate::adapter::new(&LoraConfig::default(), &modules, 0, DType::F32, decoder.device());
        let mut model = Model::new(decoder, adapters.expect("an adapter")).expect("fits");
        let tensors = model.adapters().tensors().map(|(_, tensor)| {
            // B is zero; a wave in its place, of another phase in each column
            let size = tensor.elem_count();
            let is_b = tensor.abs()?.sum_all()?.to_scalar::<f32>()? == 0.0;
            let wave: Vec<f32> = (0..size).map(|i| 0.02 * (i as f32 * 1.7).sin()).collect();
            if is_b { Tensor::from_vec(wave, tensor.shape(), tensor.device()) } else { Ok(tensor.clone()) }
        });
        let tensors = tensors.collect::<candle_core::Result<Vec<_>>>().expect("made");
        model.replace(tensors).expect("fits");
        model
    }

    fn sample(model: &Model, prompts: usize, stop: u32) -> Vec<Sampled> {
        let mut generator = Generator::new(model, Adapter::On, prompts, 16).expect("room");
        let prompt = vec![1u32, 300, 41];
        let mut answers = vec![Sampled { prompt: prompt.clone(), ids: Vec::new(), ended: false }; prompts];
        for seed in 0..prompts as u64 {
            let request = Request {
                prompt: prompt.clone(),
                stop_tokens: vec![stop],
                max_new_tokens: 8,
                sampling: Sampling { temperature: 1.0, ..Sampling::default() },
                seed,
            };
            assert_eq!(generator.add(request), Some(seed));
        }
        while !generator.is_idle() {
            let step = generator.step(|next| {
                let answer = &mut answers[next.key as usize];
                answer.ids.extend(next.token);
                answer.ended = next.end == Some(End::Stop);
                true
            });
            step.expect("computed");
        }
        answers
    }

    #[test]
    fn exact_divergences_have_the_mean_of_log_ratios_and_spread_less() {
        let model = changed();
        // any token will do as the end; one that is drawn now and then
        let stop = sample(&model, 1, u32::MAX)[0].ids[2];
        let answers = sample(&model, 400, stop);
        assert!(answers.iter().any(|answer| answer.ended) && answers.iter().any(|answer| !answer.ended));
        let bootstrap = Bootstrap { draws: 200, seed: 0 };
        let distance = Distance::of(&model, &answers, stop, bootstrap, &Console::silent()).expect("computed");
        let ratios: Vec<f64> = answers
            .iter()
            .map(|answer| {
                let branch: Vec<u32> = answer.ids.iter().copied().chain(answer.ended.then_some(stop)).collect();
                let mut packer = Packer::default();
                packer.push(0, &answer.prompt, &[&branch], PromptSpan::No);
                let batch = packer.finish();
                let logp = |adapter| -> f64 {
                    let scores = model.forward(&batch, adapter, Keep::Scores).expect("computed").scores;
                    scores.iter().map(|score| score.logp).sum()
                };
                logp(Adapter::On) - logp(Adapter::Off)
            })
            .collect();
        let differences: Vec<f64> = distance.totals.iter().zip(&ratios).map(|(exact, ratio)| exact - ratio).collect();
        let error = standard_error(&differences);
        // a martingale: the mean is zero within its standard error; 3.5 of them are passed once in two thousand seeds
        assert!(mean(&differences).abs() < 3.5 * error, "{} ± {error}", mean(&differences));
        assert!(standard_error(&distance.totals) < standard_error(&ratios));
        assert!(distance.total.estimate > 5.0 * error, "{:?} is too small to tell", distance.total);
    }

    #[test]
    fn an_adapter_that_is_zero_is_at_no_distance() {
        let mut model = changed();
        let zeros = model.adapters().tensors().map(|(_, tensor)| tensor.zeros_like());
        let zeros = zeros.collect::<candle_core::Result<Vec<_>>>().expect("made");
        model.replace(zeros).expect("fits");
        let cut = Sampled { prompt: vec![1, 5], ids: Vec::new(), ended: false };
        let answers = [Sampled { prompt: vec![1, 5], ids: vec![7, 9], ended: true }, cut];
        let distance = Distance::of(&model, &answers, 2, Bootstrap::default(), &Console::silent()).expect("computed");
        assert_eq!((distance.totals.len(), distance.total.estimate, distance.per_token.estimate), (1, 0.0, 0.0));
    }

    #[test]
    fn loops_repeat_and_prose_does_not() {
        let prose: Vec<u32> = (0..40).collect();
        let stuck: Vec<u32> = (0..40).map(|i| i % 2).collect();
        let of = |answers: &[&[u32]]| repetition(answers.iter().copied());
        assert_eq!(of(&[&prose]), Repetition { repeated_4grams: 0.0, distinct_1: 1.0, distinct_2: 1.0 });
        // 37 4-grams, two of them distinct
        assert!((of(&[&stuck]).repeated_4grams - 35.0 / 37.0).abs() < 1e-12);
        assert!((of(&[&stuck]).distinct_2 - 2.0 / 39.0).abs() < 1e-12);
        // said twice, but by two answers: each repeats nothing
        assert_eq!(of(&[&prose, &prose]).repeated_4grams, 0.0);
        assert_eq!(of(&[&prose, &prose]).distinct_1, 0.5);
        assert_eq!(of(&[&[1, 1, 1], &[]]).repeated_4grams, 0.0);
        assert_eq!(of(&[]).distinct_1, 0.0);
    }

    #[test]
    fn lengths_are_paired_and_cut_answers_counted() {
        let answer = |tokens: u32, ended| Sampled { prompt: vec![1], ids: (0..tokens).collect(), ended };
        let base = [answer(4, true), answer(10, false), answer(3, true)];
        let policy = [answer(6, true), answer(10, false), answer(0, true)];
        let answers = Answers::of(&base, &policy, Bootstrap { draws: 50, seed: 0 });
        assert_eq!(answers.base.tokens, 17.0 / 3.0);
        assert!((answers.longer.estimate + 1.0 / 3.0).abs() < 1e-12);
        assert_eq!((answers.policy.truncated, answers.policy.empty), (1.0 / 3.0, 1.0 / 3.0));
        assert_eq!(answers.identical, 1.0 / 3.0);
    }
}
