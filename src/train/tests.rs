//! Whole updates in f64 on a tiny model: what must not depend on how an update is cut into micro-batches.

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::adapter::{self, LoraConfig, Targets};
use crate::data::Dataset;
use crate::loss::{Loss, Orpo};
use crate::model::{Model, WeightFiles, family};
use crate::progress::Console;

const LOSSES: [&str; 5] = ["dpo", "ipo", "kto", "orpo", "sft"];

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
    let lora = LoraConfig { rank: 2, alpha: 4.0, rslora: false, dropout, targets: Targets::AllLinear };
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
    adapters.replace(shifted);
    Model::new(decoder.expect("read"), adapters)
}

const ROWS: [(&[u32], &[u32], &[u32]); 6] = [
    (&[1, 5, 9], &[3, 4], &[7, 8, 9, 2]),
    (&[1, 6], &[4], &[2, 2]),
    (&[1, 7, 7, 3, 5], &[9, 9, 1, 2, 6], &[8]),
    (&[1, 8], &[3, 3, 3], &[4, 5]),
    (&[1, 9, 2], &[6, 5, 4, 2], &[6, 5, 3]),
    (&[1, 5, 9], &[2], &[3, 1, 2]),
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
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        shuffle: true,
        seed: 5,
    }
}

fn tensors(trainer: &Trainer<'_>) -> Vec<f64> {
    let flat = |(_, tensor): (String, &Tensor)| tensor.flatten_all().and_then(|t| t.to_vec1::<f64>()).expect("f64");
    trainer.model().adapters().tensors().flat_map(flat).collect()
}

fn updates(loss: &Loss, data: &Dataset, micro_batch_tokens: usize, dropout: f64) -> (Vec<Metrics>, Vec<f64>) {
    let mut trainer =
        Trainer::new(model(dropout), loss.clone(), data, plan(4, micro_batch_tokens)).expect("a trainer");
    let metrics = (0..4).map(|_| trainer.update().expect("updated")).collect();
    (metrics, tensors(&trainer))
}

#[test]
fn eight_micro_batches_of_one_are_one_of_eight() {
    for (name, dropout) in LOSSES.into_iter().flat_map(|name| [(name, 0.0), (name, 0.3)]) {
        let loss = loss(name);
        let data = data(&loss);
        let (apart, a) = updates(&loss, &data, 1, dropout);
        let (together, b) = updates(&loss, &data, 1000, dropout);
        for (apart, together) in apart.iter().zip(&together) {
            let pairs = apart.json().into_iter().zip(together.json());
            for ((key, x), (_, y)) in pairs.filter(|((key, _), _)| key != "tokens_per_sec") {
                let (x, y) = (x.as_f64().expect("a number"), y.as_f64().expect("a number"));
                assert!((x - y).abs() <= 1e-9 * x.abs().max(1.0), "{name}, dropout {dropout}: {key} {x} {y}");
            }
        }
        // four updates in f64: sums in another order, divided by AdamW's root of small second moments
        for (x, y) in a.iter().zip(&b) {
            assert!((x - y).abs() < 1e-7, "{name}, dropout {dropout}: {x} {y}");
        }
    }
}

#[test]
fn orpo_with_prompts_is_the_same_in_any_micro_batch_too() {
    let loss = Loss::Orpo(Orpo { nll: crate::loss::Nll::PromptAndCompletion, ..Orpo::default() });
    let data = data(&loss);
    let ((_, a), (_, b)) = (updates(&loss, &data, 1, 0.0), updates(&loss, &data, 1000, 0.0));
    assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-7));
}

#[test]
fn swapping_the_sides_negates_the_margin() {
    let swapped: Vec<_> = ROWS.iter().map(|(prompt, chosen, rejected)| (*prompt, *rejected, *chosen)).collect();
    let margin = |data: &Dataset| {
        let loss = loss("dpo");
        let trainer = Trainer::new(model(0.0), loss.clone(), data, plan(4, 100)).expect("a trainer");
        let mut evaluation = Evaluation::new(data, &loss, 100);
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
fn held_out_metrics_do_not_depend_on_the_budget_and_every_loss_has_them_for_pairs() {
    for name in LOSSES {
        let (loss, data) = (loss(name), Dataset::of(&ROWS));
        let measure = |budget| {
            let training = self::data(&loss);
            let trainer = Trainer::new(model(0.0), loss.clone(), &training, plan(4, 100)).expect("a trainer");
            trainer.evaluate(&mut Evaluation::new(&data, &loss, budget), &|_| ()).expect("measured")
        };
        let (small, large) = (measure(1), measure(1000));
        assert!(small.get("logps/accuracies").is_some() && small.get("loss").is_some_and(f64::is_finite), "{name}");
        for ((key, x), (_, y)) in small.json().into_iter().zip(large.json()) {
            let (x, y) = (x.as_f64().expect("a number"), y.as_f64().expect("a number"));
            assert!((x - y).abs() <= 1e-10 * x.abs().max(1.0), "{name}: {key} {x} {y}");
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
    let mut trainer = Trainer::new(model(0.0), loss, &data, plan(4, 100)).expect("a trainer");
    let epochs: Vec<f64> = (0..4).map(|_| trainer.update().expect("updated").get("epoch").expect("there")).collect();
    assert!((epochs[0] - 4.0 / 6.0).abs() < 1e-12);
    assert_eq!(epochs[1], 1.0);
    assert_eq!(epochs[3], 2.0);
}

#[test]
fn a_loss_that_is_not_finite_names_its_row() {
    let (loss, data) = (loss("dpo"), Dataset::of(&ROWS));
    let mut broken = model(0.0);
    let tensors: Vec<Tensor> =
        broken.adapters().tensors().map(|(_, tensor)| (tensor * f64::NAN).expect("broken")).collect();
    broken.adapters_mut().replace(tensors);
    let mut trainer = Trainer::new(broken, loss, &data, plan(1, 100)).expect("a trainer");
    let error = trainer.update().expect_err("not finite");
    assert!(error.to_string().contains("update 1: the loss of pairs.jsonl row"), "{error}");
    assert_eq!(trainer.step(), 0);
}
