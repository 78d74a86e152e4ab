//! Whole updates in f64 on a tiny model: what must not depend on how an update is cut into micro-batches, nor on whether
//! prompts are shared.

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::adapter::{self, LoraConfig, Targets};
use crate::data::Dataset;
use crate::loss::{Loss, Orpo};
use crate::model::memory::Saved;
use crate::model::{Model, WeightFiles, family};
use crate::progress::Console;

/// Every loss, and ORPO with TRL's likelihood.
fn losses() -> [(&'static str, Loss); 6] {
    let nll = crate::loss::Nll::PromptAndCompletion;
    let orpo = ("orpo with prompts", Loss::Orpo(Orpo { nll, ..Orpo::default() }));
    let [dpo, ipo, kto, orpo_alone, sft] = ["dpo", "ipo", "kto", "orpo", "sft"].map(|name| (name, loss(name)));
    [dpo, ipo, kto, orpo_alone, sft, orpo]
}

fn loss(name: &str) -> Loss {
    #[derive(serde::Deserialize)]
    struct Table {
        loss: Loss,
    }
    toml::from_str::<Table>(&format!("[loss.{name}]")).expect("every loss has defaults").loss
}

/// A model of the fixtures in f64, with an adapter whose `B` is not zero.
fn model(dropout: f64) -> Model {
    let folder = std::path::Path::new("tests/fixtures/golden/gqa");
    let config = family::read_config(folder).expect("a config");
    let lora = LoraConfig { rank: 2, alpha: 4.0, dropout, targets: Targets::AllLinear, ..LoraConfig::default() };
    let mut adapters = adapter::new(&lora, &config.modules(), 1, DType::F64, &Device::Cpu).expect("made");
    let decoder = WeightFiles::open(folder).expect("opened").decoder(config, DType::F64, &Console::silent());
    let shifted: Vec<Tensor> = adapters
        .tensors()
        .enumerate()
        .map(|(i, (_, tensor))| {
            let count = tensor.elem_count();
            let wave = (0..count).map(|j| 0.1 * ((i + 3 * j) as f64).sin()).collect::<Vec<_>>();
            (tensor + Tensor::from_vec(wave, tensor.dims(), &Device::Cpu).expect("made")).expect("added")
        })
        .collect();
    adapters.replace(shifted).expect("replaced");
    Model::new(decoder.expect("read"), adapters).expect("made")
}

/// Prompts that return, prompts and completions of one token, completions that begin alike.
const ROWS: [(&[u32], &[u32], &[u32]); 8] = [
    (&[1, 5, 9], &[3, 4], &[7, 8, 9, 2]),
    (&[1, 6], &[4], &[2, 2]),
    (&[1, 7, 7, 3, 5], &[9, 9, 1, 2, 6], &[8]),
    (&[1], &[3, 3, 3], &[4, 5]),
    (&[1, 9, 2], &[6, 5, 4, 2], &[6, 5, 3]),
    (&[1, 5, 9], &[2], &[3, 1, 2]),
    (&[1], &[2], &[2, 7]),
    (&[1, 5, 9], &[7, 1], &[8]),
];

/// Pairs, or each completion by itself for a loss that learns from those.
fn data(loss: &Loss) -> Dataset {
    match loss.examples() {
        crate::loss::Examples::Labelled => {
            let apart = |row: &(&'static [u32], &'static [u32], &'static [u32])| {
                let (prompt, chosen, rejected) = *row;
                [(prompt, chosen, &[][..]), (prompt, &[][..], rejected)]
            };
            Dataset::of(&ROWS.iter().flat_map(apart).collect::<Vec<_>>())
        }
        _ => Dataset::of(&ROWS),
    }
}

fn plan(batch_size: usize, micro_batch_tokens: usize) -> Plan {
    Plan {
        steps: 4,
        warmup: 0,
        batch_size,
        micro_batch_tokens,
        scoring_tokens: micro_batch_tokens,
        saved: vec![Saved::All; 2],
        share_prompts: true,
        learning_rate: 1e-2,
        loraplus_ratio: 1.0,
        schedule: Schedule::Constant,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        shuffle: true,
        seed: 5,
        begins_as_reference: false,
    }
}

/// What four updates gave.
struct Trained {
    metrics: Vec<Metrics>,
    /// Of the first update.
    gradient: Vec<f64>,
    adapter: Vec<f64>,
}

fn train(loss: &Loss, plan: Plan, dropout: f64) -> Trained {
    let data = data(loss);
    let mut trainer = Trainer::new(model(dropout), loss.clone(), &data, plan).expect("a trainer");
    let flat = |tensor: &Tensor| tensor.flatten_all().and_then(|t| t.to_vec1::<f64>()).expect("f64");
    let mut metrics = vec![trainer.update().expect("updated")];
    // after one update the first moment is a tenth of it
    let gradient = trainer.optimizer().moments().iter().flat_map(|moments| flat(&moments.first)).collect();
    metrics.extend((0..3).map(|_| trainer.update().expect("updated")));
    let adapter = trainer.model().adapters().tensors().flat_map(|(_, tensor)| flat(tensor)).collect();
    Trained { metrics, gradient, adapter }
}

fn assert_same(what: &str, a: &Trained, b: &Trained) {
    let largest = a.gradient.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    for (x, y) in a.gradient.iter().zip(&b.gradient) {
        assert!((x - y).abs() <= 1e-12 * largest, "{what}: gradient {x} {y} of {largest}");
    }
    for (step, (a, b)) in a.metrics.iter().zip(&b.metrics).enumerate() {
        let tolerance = if step == 0 { 1e-12 } else { 1e-9 };
        assert_metrics_agree(&format!("{what}, update {step}"), a, b, tolerance);
    }
    // sums in another order, divided by AdamW's root of small second moments
    for (x, y) in a.adapter.iter().zip(&b.adapter) {
        assert!((x - y).abs() < 1e-7, "{what}: adapter {x} {y}");
    }
}

fn assert_metrics_agree(what: &str, a: &Metrics, b: &Metrics, tolerance: f64) {
    let (a, b) = (a.json(), b.json());
    assert!(a.keys().eq(b.keys()), "{what}");
    for ((key, x), (_, y)) in a.iter().zip(&b).filter(|((key, _), _)| *key != "tokens_per_sec") {
        let (x, y) = (x.as_f64().expect("a number"), y.as_f64().expect("a number"));
        assert!((x - y).abs() <= tolerance * x.abs().max(1.0), "{what}: {key} {x} {y}");
    }
}

#[test]
fn neither_micro_batches_nor_shared_prompts_change_an_update() {
    for (name, loss) in losses() {
        let alone = train(&loss, Plan { share_prompts: false, ..plan(8, 1) }, 0.0);
        for share_prompts in [true, false] {
            for budget in [1, 13, 1000] {
                let other = train(&loss, Plan { share_prompts, ..plan(8, budget) }, 0.0);
                assert_same(&format!("{name}, {budget} rows, shared {share_prompts}"), &alone, &other);
            }
        }
    }
}

#[test]
fn dropout_goes_with_the_example_into_any_micro_batch() {
    for (name, loss) in losses() {
        let train = |budget| train(&loss, Plan { share_prompts: false, ..plan(8, budget) }, 0.3);
        assert_same(name, &train(1), &train(1000));
    }
}

#[test]
fn the_kl_of_kto_is_that_of_each_mismatched_completion_by_itself() {
    let (loss, model) = (loss("kto"), model(0.0));
    let data = data(&loss);
    let items: Vec<_> = (0..data.len()).map(|index| super::batch::Item::example(&data, index)).collect();
    let kl = |share_prompts, budget| {
        let layout = super::batch::Layout::new(&loss, share_prompts);
        super::trainer::mismatched_kl(&model, crate::model::Adapter::On, &items, layout, budget).expect("computed")
    };
    let expected = kl(false, 1);
    assert!(expected > 0.0, "{expected}");
    for (share_prompts, budget) in [(true, 1), (true, 13), (true, 1000), (false, 1000)] {
        assert!((kl(share_prompts, budget) / expected - 1.0).abs() < 1e-12);
    }
}

#[test]
fn swapping_the_sides_negates_the_margin() {
    let swapped: Vec<_> = ROWS.iter().map(|(prompt, chosen, rejected)| (*prompt, *rejected, *chosen)).collect();
    let margin = |data: &Dataset| {
        let loss = loss("dpo");
        let trainer = Trainer::new(model(0.0), loss.clone(), data, plan(4, 100)).expect("a trainer");
        let mut evaluation = Evaluation::new(data, &loss, true, 100);
        let metrics = trainer.evaluate(&mut evaluation, &|_| ()).expect("measured");
        (metrics.get("rewards/margins").expect("pairs"), metrics.get("rewards/accuracies").expect("pairs"))
    };
    let ((margin_a, accuracy_a), (margin_b, accuracy_b)) =
        (margin(&Dataset::of(&ROWS)), margin(&Dataset::of(&swapped)));
    assert!(margin_a.abs() > 1e-3);
    assert!((margin_a + margin_b).abs() < 1e-12);
    assert!((accuracy_a + accuracy_b - 1.0).abs() < 1e-12);
}

#[test]
fn held_out_metrics_do_not_depend_on_the_rows_and_every_loss_has_them_for_pairs() {
    for (name, loss) in losses() {
        let data = Dataset::of(&ROWS);
        let measure = |share_prompts, budget| {
            let training = self::data(&loss);
            let trainer = Trainer::new(model(0.0), loss.clone(), &training, plan(4, 100)).expect("a trainer");
            let mut evaluation = Evaluation::new(&data, &loss, share_prompts, budget);
            trainer.evaluate(&mut evaluation, &|_| ()).expect("measured")
        };
        let alone = measure(false, 1);
        assert!(alone.get("logps/accuracies").is_some() && alone.get("loss").is_some_and(f64::is_finite), "{name}");
        for (share_prompts, budget) in [(true, 1), (true, 13), (true, 1000), (false, 1000)] {
            let what = format!("{name}, {budget} rows, shared {share_prompts}");
            assert_metrics_agree(&what, &alone, &measure(share_prompts, budget), 1e-12);
        }
    }
}

#[test]
fn kto_needs_no_second_row() {
    let loss = loss("kto");
    let data = Dataset::of(&[(&[1, 2], &[3], &[])]);
    let mut trainer = Trainer::new(model(0.0), loss, &data, plan(1, 100)).expect("a trainer");
    let metrics = trainer.update().expect("updated");
    assert_eq!(metrics.get("kl"), Some(0.0));
}

#[test]
fn every_epoch_sees_every_row_once_and_the_last_update_of_it_is_smaller() {
    let (loss, data) = (loss("dpo"), Dataset::of(&ROWS));
    let mut trainer = Trainer::new(model(0.0), loss, &data, plan(5, 100)).expect("a trainer");
    let epochs: Vec<f64> = (0..4).map(|_| trainer.update().expect("updated").get("epoch").expect("there")).collect();
    assert!((epochs[0] - 5.0 / 8.0).abs() < 1e-12);
    assert_eq!(epochs[1], 1.0);
    assert_eq!(epochs[3], 2.0);
}

#[test]
fn a_loss_that_is_not_finite_names_its_row() {
    let (loss, data) = (loss("dpo"), Dataset::of(&ROWS));
    let mut broken = model(0.0);
    let tensors: Vec<Tensor> =
        broken.adapters().tensors().map(|(_, tensor)| (tensor * f64::NAN).expect("broken")).collect();
    broken.replace(tensors).expect("replaced");
    let mut trainer = Trainer::new(broken, loss, &data, plan(1, 100)).expect("a trainer");
    let error = trainer.update().expect_err("not finite");
    assert!(error.to_string().contains("update 1: the loss of pairs.jsonl row"), "{error}");
    assert_eq!(trainer.step(), 0);
}

/// The quickstart's model in f32 with a fresh adapter.
fn fresh() -> Model {
    let folder = std::path::Path::new("recipes/quickstart/model");
    let config = family::read_config(folder).expect("a config");
    let lora = LoraConfig { rank: 2, alpha: 4.0, dropout: 0.0, targets: Targets::AllLinear, ..LoraConfig::default() };
    let adapters = adapter::new(&lora, &config.modules(), 1, DType::F32, &Device::Cpu).expect("made");
    let decoder = WeightFiles::open(folder).expect("opened").decoder(config, DType::F32, &Console::silent());
    Model::new(decoder.expect("read"), adapters).expect("made")
}

/// Rounding is all that another packing changes, and the check at the start of a run allows for it: single completions,
/// completions of one token and prompts that several examples share take other ways through the kernels.
#[test]
fn a_reference_computed_beforehand_is_that_of_the_update() {
    let ids = |seed: u32, count: u32| (0..count).map(|i| 3 + (seed * 131 + i * i * 7 + i) % 500).collect::<Vec<_>>();
    let rows: Vec<_> = (0..24)
        .map(|i| (ids(i / 2, 1 + i / 2 * 5 % 23), ids(i + 50, 1 + i * 11 % 90), ids(i + 90, 1 + i * 7 % 70)))
        .collect();
    let pairs: Vec<_> = rows.iter().map(|(p, c, r)| (&p[..], &c[..], &r[..])).collect();
    let sides: Vec<_> =
        rows.iter().flat_map(|(p, c, r)| [(&p[..], &c[..], &[][..]), (&p[..], &[][..], &r[..])]).collect();
    let model = fresh();
    let plan_of_four = Plan { saved: vec![crate::model::memory::Saved::All; 4], ..plan(16, 300) };
    for (name, rows) in [("dpo", &pairs), ("ipo", &pairs), ("kto", &sides)] {
        let data = Dataset::of(rows);
        let computed = |budget| {
            let mut trainer =
                Trainer::new(model.clone(), loss(name), &data, plan_of_four.clone()).expect("a trainer");
            let needed = trainer.needed_references();
            trainer.compute_references(&needed, budget).expect("computed");
            trainer
        };
        let alone = computed(1);
        for budget in [200, 10_000] {
            let mut trainer = computed(budget);
            for (a, b) in trainer.reference().flat().iter().zip(alone.reference().flat()) {
                assert!(a.is_nan() && b.is_nan() || reference::agree(*a, *b), "{a} {b}");
            }
            trainer.update().expect("the check at the start holds");
        }
    }
}
