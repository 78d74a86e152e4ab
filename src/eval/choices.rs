//! Multiple-choice questions by log-prob, adapter off and on in one load.

use serde::Serialize;

use super::BATCH_ROWS;
use crate::data::Question;
use crate::model::packed::rows;
use crate::model::{Adapter, Keep, Model, Packer, PromptSpan};
use crate::progress::Console;
use crate::statistics::{Bootstrap, Clusters, Estimate, mcnemar};

/// Accuracies of base and policy on the same questions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Share that the base gets right.
    pub base: f64,
    /// Share that the policy gets right.
    pub policy: f64,
    /// Policy minus base.
    pub difference: f64,
    /// `sd(d) / √n` of the differences `d_i ∈ {−1, 0, 1}` of the questions: both answer the same ones, so it is far smaller
    /// than that of two independent shares.
    pub standard_error: f64,
    /// Of 95 %, of the difference.
    pub interval: [f64; 2],
    /// Exact McNemar test: how probable a split at least as uneven is if nothing changed.
    pub mcnemar: f64,
    /// Questions that only the base gets right.
    pub only_base: usize,
    /// Questions that only the policy gets right.
    pub only_policy: usize,
}

impl Compared {
    fn of(base: &[bool], policy: &[bool], bootstrap: Bootstrap) -> Self {
        let share = |right: &[bool]| right.iter().filter(|right| **right).count() as f64 / right.len().max(1) as f64;
        let number = |right: bool| f64::from(u8::from(right));
        let differences: Vec<f64> = base.iter().zip(policy).map(|(&b, &p)| number(p) - number(b)).collect();
        let Estimate { estimate, standard_error, interval, .. } =
            bootstrap.mean(&differences, &Clusters::each(differences.len()));
        let (only_base, only_policy) = base.iter().zip(policy).fold((0, 0), |(b, p), pair| match pair {
            (true, false) => (b + 1, p),
            (false, true) => (b, p + 1),
            _ => (b, p),
        });
        Self {
            base: share(base),
            policy: share(policy),
            difference: estimate,
            standard_error,
            interval,
            mcnemar: mcnemar(only_base, only_policy),
            only_base,
            only_policy,
        }
    }
}

/// What base and policy answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChoiceResult {
    /// Number of questions.
    pub questions: usize,
    /// What guessing gets: the mean of one over the number of choices.
    pub chance: f64,
    /// By the choice's summed log-prob: lm-eval's `acc`.
    #[serde(flatten)]
    pub summed: Compared,
    /// By the log-prob a character of the choice: lm-eval's `acc_norm`.
    pub normalized: Compared,
    /// Questions whose beginning was left out to fit the model's longest position.
    pub cut: usize,
    /// Summed log-probs of each question's choices by the base.
    #[serde(skip)]
    pub base_logps: Vec<Vec<f64>>,
    /// The same by the policy.
    #[serde(skip)]
    pub policy_logps: Vec<Vec<f64>>,
}

/// Scores every choice of every question with the adapter off and on. The choices of a question share its rows.
///
/// # Errors
/// What candle returns.
pub fn score_choices(
    model: &Model,
    questions: &[Question],
    bootstrap: Bootstrap,
    console: &Console,
) -> candle_core::Result<ChoiceResult> {
    let longest = model.decoder().config().max_position_embeddings;
    let bar = console.count_bar("questions", questions.len() as u64);
    let (mut base_logps, mut policy_logps, mut cut) = (Vec::new(), Vec::new(), 0);
    let mut start = 0;
    while start < questions.len() {
        let (mut packer, mut filled, mut end) = (Packer::default(), 0, start);
        while let Some(question) = questions.get(end) {
            let branches: Vec<&[u32]> = question.choices.iter().map(Vec::as_slice).collect();
            let lengths: Vec<usize> = branches.iter().map(|branch| branch.len()).collect();
            // as lm-eval: the beginning is left out, at least one token of the question stays
            let room = longest.saturating_sub(lengths.iter().max().copied().unwrap_or(0)).max(1);
            let kept = &question.prompt[question.prompt.len().saturating_sub(room)..];
            let more = rows(kept.len(), &lengths);
            if filled > 0 && filled + more > BATCH_ROWS {
                break;
            }
            cut += usize::from(kept.len() < question.prompt.len());
            packer.push(0, kept, &branches, PromptSpan::No);
            filled += more;
            end += 1;
        }
        let batch = packer.finish();
        for (adapter, logps) in [(Adapter::Off, &mut base_logps), (Adapter::On, &mut policy_logps)] {
            let scores = model.forward(&batch, adapter, Keep::Scores)?.scores;
            let mut spans = batch.spans.iter();
            for question in &questions[start..end] {
                let spans = spans.by_ref().take(question.choices.len());
                logps.push(
                    spans.map(|span| scores[span.clone()].iter().map(|score| score.logp).sum()).collect::<Vec<f64>>(),
                );
            }
        }
        bar.advance((end - start) as u64);
        start = end;
    }
    let right = |logps: &[Vec<f64>], by_character: bool| {
        let questions = questions.iter().zip(logps);
        let is_right = |(question, logps): (&Question, &Vec<f64>)| {
            let score = |i: usize| match by_character {
                true => logps[i] / question.characters[i].max(1) as f64,
                false => logps[i],
            };
            // the first of equals, as numpy's argmax
            (0..logps.len()).fold(0, |best, i| if score(i) > score(best) { i } else { best }) == question.gold
        };
        questions.map(is_right).collect::<Vec<bool>>()
    };
    let compared = |by_character| {
        Compared::of(&right(&base_logps, by_character), &right(&policy_logps, by_character), bootstrap)
    };
    let chance = questions.iter().map(|question| 1.0 / question.choices.len() as f64).sum::<f64>();
    Ok(ChoiceResult {
        questions: questions.len(),
        chance: chance / questions.len().max(1) as f64,
        summed: compared(false),
        normalized: compared(true),
        cut,
        base_logps,
        policy_logps,
    })
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use candle_core::DType;
    use serde::Deserialize;

    use super::*;
    use crate::adapter::{LoraConfig, peft};
    use crate::data::{ChoiceForm, Codec, load_choices};
    use crate::model::Base;
    use crate::quant::Quant;

    /// By lm-evaluation-harness; see scripts/make_choices_fixtures.py.
    #[derive(Deserialize)]
    struct Fixture {
        quickstart: Vec<Answered>,
        #[serde(rename = "stories260K")]
        stories: Vec<Answered>,
        #[serde(rename = "stories260K_trl")]
        stories_trl: Vec<Answered>,
    }

    #[derive(Deserialize)]
    struct Answered {
        logps: Vec<f64>,
        acc: usize,
        acc_norm: usize,
    }

    fn here(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    fn fixture() -> Fixture {
        serde_json::from_str(include_str!("../../tests/fixtures/choices.json")).expect("JSON")
    }

    fn scored(model: &Path, adapter: Option<&Path>) -> ChoiceResult {
        let base = Base::local(model).expect("there");
        let config = base.config(Quant::None).expect("a config");
        let modules = config.modules();
        let (decoder, _) = base.load(config, &Console::silent()).expect("weights");
        let adapters = match adapter {
            Some(folder) => peft::load(folder, &modules, DType::F32),
            None => crate::adapter::new(&LoraConfig::default(), &modules, 0, DType::F32, decoder.device()),
        };
        let model_with = Model::new(decoder, adapters.expect("an adapter")).expect("fits");
        let codec = Codec::open(model, None).expect("a tokenizer");
        let file = here("tests/fixtures/choices.jsonl");
        let questions = load_choices(&file, &codec, ChoiceForm::Plain, &Console::silent()).expect("read");
        let bootstrap = Bootstrap { draws: 100, seed: 0 };
        score_choices(&model_with, &questions, bootstrap, &Console::silent()).expect("scored")
    }

    fn agree(ours: &[Vec<f64>], acc: f64, acc_norm: f64, theirs: &[Answered]) {
        // both compute in f32, with sums in another order; the largest log-prob here is about 200
        for (question, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(ours.len(), theirs.logps.len());
            for (ours, theirs) in ours.iter().zip(&theirs.logps) {
                assert!((ours - theirs).abs() < 2e-4 * theirs.abs().max(1.0), "question {question}: {ours} {theirs}");
            }
        }
        let share = |of: fn(&Answered) -> usize| theirs.iter().map(of).sum::<usize>() as f64 / theirs.len() as f64;
        assert_eq!(ours.len(), theirs.len());
        assert_eq!((acc, acc_norm), (share(|one| one.acc), share(|one| one.acc_norm)));
    }

    #[test]
    fn log_likelihoods_and_accuracies_are_lm_evals() {
        let result = scored(&here("recipes/quickstart/model"), None);
        agree(&result.base_logps, result.summed.base, result.normalized.base, &fixture().quickstart);
        // an adapter that is zero changes nothing
        assert_eq!(result.base_logps, result.policy_logps);
        assert_eq!((result.summed.difference, result.summed.mcnemar, result.cut), (0.0, 1.0, 0));
        // 4 choices, 3, 4, 2, 4, 3, 3, 3
        assert!((result.chance - (3.0 / 4.0 + 4.0 / 3.0 + 0.5) / 8.0).abs() < 1e-12);
    }

    #[test]
    fn a_real_adapter_answers_as_it_does_in_lm_eval() {
        let Some(real) = std::env::var_os("DPO_LORA_REAL").map(PathBuf::from) else {
            eprintln!("skipped: DPO_LORA_REAL is not set");
            return;
        };
        let adapter = real.join("adapters/trl-dpo-stories260K/sigmoid/final");
        let result = scored(&real.join("stories260K"), Some(&adapter));
        agree(&result.base_logps, result.summed.base, result.normalized.base, &fixture().stories);
        agree(&result.policy_logps, result.summed.policy, result.normalized.policy, &fixture().stories_trl);
    }

    #[test]
    fn what_changed_is_paired() {
        let base = [true, true, true, false, false, true, true, true];
        let policy = [true, true, false, true, false, false, false, true];
        let compared = Compared::of(&base, &policy, Bootstrap { draws: 200, seed: 0 });
        assert_eq!((compared.base, compared.policy, compared.difference), (0.75, 0.5, -0.25));
        assert_eq!((compared.only_base, compared.only_policy), (3, 1));
        // d = 0 0 −1 1 0 −1 −1 0: Σ(d + ¼)² = 3·9/16 + 25/16 + 4/16 = 56/16
        assert!((compared.standard_error - (3.5f64 / 7.0 / 8.0).sqrt()).abs() < 1e-12);
        // 3 to 1: 2 · (4 + 1) / 16
        assert!((compared.mcnemar - 0.625).abs() < 1e-12);
    }
}
