use std::f64::consts::LN_2;

use proptest::prelude::*;

use super::*;
use crate::range::{NonNegative, Positive, Smoothing};

/// A recipe with a loss and nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Recipe {
    loss: Loss,
}

fn from_toml(text: &str) -> std::result::Result<Loss, toml::de::Error> {
    toml::from_str::<Recipe>(text).map(|recipe| recipe.loss)
}

/// Every loss there is, as its empty table gives it. The names are those that the parser accepts, so that no variant
/// can be forgotten here.
fn defaults() -> Vec<Loss> {
    let error = from_toml("[loss.none]").expect_err("not a loss").message().to_owned();
    let (_, names) = error.split_once("expected one of ").expect("the names");
    let names = names.split(", ").map(|name| name.trim_matches('`'));
    names.map(|name| from_toml(&format!("[loss.{name}]")).expect("an empty table is enough")).collect()
}

/// The defaults, and what they leave out.
fn losses() -> Vec<Loss> {
    let beta = Positive::constant(0.7);
    let mut losses = defaults();
    losses.extend([
        Loss::Dpo(Dpo { beta, label_smoothing: Smoothing::constant(0.2) }),
        Loss::Ipo(Ipo { beta, reduction: Reduction::Sum }),
        Loss::Kto(Kto {
            beta,
            desirable_weight: NonNegative::constant(1.3),
            undesirable_weight: NonNegative::constant(0.6),
        }),
        Loss::Orpo(Orpo { beta, nll: Nll::PromptAndCompletion }),
    ]);
    losses
}

fn sequence(logp: f64, reference: f64, tokens: usize) -> Sequence {
    Sequence { logp, reference: Some(reference), tokens }
}

fn pair(chosen: Sequence, rejected: Sequence) -> Scored {
    Scored { prompt: None, chosen: Some(chosen), rejected: Some(rejected) }
}

/// What `loss` learns from, made of a prompt and two completions; of two, a labelled example keeps one.
fn example(loss: &Loss, prompt: Sequence, sides: [Sequence; 2], label: bool) -> Scored {
    let prompt = Some(prompt).filter(|_| loss.scores_prompt());
    let labelled = loss.examples() == Examples::Labelled;
    let [chosen, rejected] = [(0, label), (1, !label)].map(|(i, kept)| Some(sides[i]).filter(|_| kept || !labelled));
    Scored { prompt, chosen, rejected }
}

fn total(loss: &Loss, examples: &[Scored], update: &Update) -> f64 {
    let evaluated = loss.evaluate(examples, update).expect("a loss");
    evaluated.losses.iter().sum::<f64>() / update.examples as f64
}

fn sides(example: &mut Scored) -> [&mut Option<Sequence>; 3] {
    [&mut example.prompt, &mut example.chosen, &mut example.rejected]
}

/// Relative, and absolute near zero.
#[track_caller]
fn close(got: f64, expected: f64, tolerance: f64) {
    assert!((got - expected).abs() <= tolerance * expected.abs().max(1.0), "{got} is not {expected}");
}

/// Computed from the papers' formulas in plain Python, to six digits.
#[test]
fn six_digits_of_two_pairs() {
    let pairs = [
        pair(sequence(-20.0, -21.0, 10), sequence(-25.0, -23.0, 12)),
        pair(sequence(-40.0, -38.0, 16), sequence(-30.0, -31.0, 9)),
    ];
    let losses = |loss: &str, examples: &[Scored], kl| {
        let loss = from_toml(loss).expect("a loss");
        loss.evaluate(examples, &loss.update(examples, kl)).expect("losses")
    };
    for (loss, expected) in [
        ("[loss.dpo]", [0.554355, 0.854355]),
        ("[loss.dpo]\nlabel_smoothing = 0.1", [0.584355, 0.824355]),
        ("[loss.ipo]", [22.404444, 27.416860]),
        ("[loss.ipo]\nreduction = 'sum'", [4.0, 64.0]),
    ] {
        for (got, expected) in losses(loss, &pairs, 0.0).losses.into_iter().zip(expected) {
            close(got, expected, 5e-7);
        }
    }
    let desirable = Scored { rejected: None, ..pairs[0] };
    let undesirable = Scored { chosen: None, ..pairs[0] };
    let kto = losses("[loss.kto]", &[desirable, undesirable], 0.5).losses;
    close(kto[0], 0.487503, 5e-7);
    close(kto[1], 0.437823, 5e-7);
    let orpo = losses("[loss.orpo]", &pairs, 0.0);
    for (i, expected) in [0.064641, 0.034620].into_iter().enumerate() {
        assert_eq!(orpo.terms[0].0, "nll_loss");
        close(orpo.losses[i] - orpo.terms[0].1[i], expected, 5e-7);
    }
}

/// TRL's own code on the same numbers, in f64 on both sides: only the order of roundings differs.
#[test]
fn agrees_with_trl() {
    const TOLERANCE: f64 = 1e-10;
    type Side = Option<(f64, Option<f64>, usize)>;
    #[derive(Deserialize)]
    struct Fixture {
        cases: Vec<Case>,
    }
    #[derive(Deserialize)]
    struct Case {
        loss: Loss,
        kl: f64,
        examples: Vec<[Side; 3]>,
        value: f64,
        slopes: Vec<[f64; 3]>,
        metrics: std::collections::BTreeMap<String, f64>,
    }
    let fixture: Fixture =
        serde_json::from_str(include_str!("../../tests/fixtures/losses.json")).expect("the fixture");
    let mut covered = Vec::new();
    for case in fixture.cases {
        let loss = case.loss;
        covered.push(loss.name());
        let scored = |side: Side| side.map(|(logp, reference, tokens)| Sequence { logp, reference, tokens });
        let examples: Vec<Scored> = (case.examples.iter().map(|sides| sides.map(scored)))
            .map(|[prompt, chosen, rejected]| Scored { prompt, chosen, rejected })
            .collect();
        let update = loss.update(&examples, case.kl);
        close(total(&loss, &examples, &update), case.value, TOLERANCE);

        let evaluated = loss.evaluate(&examples, &update).expect("a loss");
        // the slopes are smaller than one: the tolerance is of the largest
        let largest = case.slopes.iter().flatten().fold(0.0f64, |largest, slope| largest.max(slope.abs()));
        for (got, expected) in evaluated.slopes.iter().zip(&case.slopes) {
            for (got, expected) in [got.prompt, got.chosen, got.rejected].into_iter().zip(expected) {
                assert!((got - expected).abs() <= TOLERANCE * largest, "{loss:?}: {got} is not {expected}");
            }
        }

        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        for (name, expected) in case.metrics {
            let rewards = |side: fn(&Scored) -> Option<Sequence>| {
                let rewards = examples.iter().map(|example| loss.reward(&side(example)?));
                mean(&rewards.map(|reward| reward.expect("a reward")).collect::<Vec<_>>())
            };
            let got = match name.as_str() {
                "rewards/chosen" => rewards(|example| example.chosen),
                "rewards/rejected" => rewards(|example| example.rejected),
                term => mean(&evaluated.terms.iter().find(|(name, _)| *name == term).expect("the term").1),
            };
            close(got, expected, TOLERANCE);
        }
    }
    assert!(defaults().iter().all(|loss| covered.contains(&loss.name())), "the fixture has every loss");
}

#[test]
fn tables_parse_and_write_back() {
    for loss in losses() {
        let recipe = Recipe { loss: loss.clone() };
        let text = toml::to_string(&recipe).expect("TOML");
        assert!(text.starts_with(&format!("[loss.{}]", loss.name())), "{text}");
        assert_eq!(from_toml(&text).expect("its own TOML"), loss);
        let mistaken = from_toml(&format!("{text}\nbetta = 0.1")).expect_err("an unknown key");
        assert!(mistaken.message().contains("unknown field `betta`"), "{mistaken}");
    }
    for wrong in ["dpo]\nbeta = 0", "dpo]\nlabel_smoothing = 0.5", "ipo]\nreduction = 'mean'", "kto]\nbeta = -1.0"] {
        assert!(from_toml(&format!("[loss.{wrong}")).is_err(), "{wrong}");
    }
}

#[test]
fn the_initial_value_is_the_loss_of_a_policy_that_is_its_reference() {
    let same = |logp, tokens| sequence(logp, logp, tokens);
    for loss in losses() {
        let examples = [(-3.25, -40.5, true), (-117.0, -1.0, false), (-0.5, -9.0, false)]
            .map(|(a, b, label)| example(&loss, same(-8.0, 4), [same(a, 3), same(b, 17)], label));
        match loss.initial_value(&examples) {
            // a rounding or two
            Some(value) => close(total(&loss, &examples, &loss.update(&examples, 0.0)), value, 1e-15),
            None => assert!(!loss.needs_reference()),
        }
    }
}

#[test]
fn what_is_missing_is_refused() {
    let whole = sequence(-5.0, -5.0, 3);
    let unscored = Sequence { reference: None, ..whole };
    let empty = Sequence { tokens: 0, ..whole };
    let refuses = |loss: &str, example: Scored, says: &str| {
        let loss = from_toml(loss).expect("a loss");
        let update = loss.update(&[example], 0.0);
        let error = loss.evaluate(&[example], &update).expect_err("an incomplete example").to_string();
        assert!(error.contains(says), "{error}");
    };
    let complete = pair(whole, whole);
    refuses("[loss.dpo]", Scored { rejected: None, ..complete }, "dpo: example 0 is not one of Pairs");
    refuses("[loss.ipo]", pair(whole, unscored), "not scored under the reference");
    refuses("[loss.ipo]", pair(empty, whole), "no tokens");
    refuses("[loss.kto]", complete, "kto: example 0 is not one of Labelled");
    refuses("[loss.orpo]\nnll = 'prompt+completion'", complete, "the prompt of example 0 was not scored");
    refuses("[loss.sft]", Scored { chosen: None, ..complete }, "not one of Demonstrations");
}

/// Of no use, and of no harm: an update may end in an empty part.
#[test]
fn no_examples_give_no_losses() {
    for loss in losses() {
        let update = Update { examples: 8, nll_tokens: 100, kl: 0.0 };
        assert!(loss.evaluate(&[], &update).expect("nothing").losses.is_empty());
    }
}

#[test]
fn extremes_stay_finite() {
    let logps = [-1e4, -40.0, -1e-12, -f64::MIN_POSITIVE, -0.0, 0.0];
    for loss in losses() {
        for (a, b) in logps.into_iter().flat_map(|a| logps.map(|b| (a, b))) {
            for (reference, label) in [(-1e4, true), (-1e4, false), (0.0, true), (0.0, false)] {
                let sides = [sequence(a, reference, 1), sequence(b, -1e4 - reference, 7)];
                let examples = [example(&loss, sequence(b, 0.0, 5), sides, label)];
                let evaluated = loss.evaluate(&examples, &loss.update(&examples, 0.0)).expect("a loss");
                let Slopes { prompt, chosen, rejected } = evaluated.slopes[0];
                let terms = evaluated.terms.iter().flat_map(|(_, values)| values.iter().copied());
                for value in [evaluated.losses[0], prompt, chosen, rejected].into_iter().chain(terms) {
                    assert!(value.is_finite(), "{loss:?} on {:?}: {evaluated:?}", examples[0]);
                }
            }
        }
    }
}

/// A sequence as a model scores them: up to 300 tokens of 0.02 to 4 nats, and a reference not far away.
fn any_sequence() -> impl Strategy<Value = Sequence> {
    (1usize..300, 0.02..4.0, -20.0..20.0).prop_map(|(tokens, nats, away): (_, f64, f64)| {
        let logp = -nats * tokens as f64;
        sequence(logp, (logp + away).min(0.0), tokens)
    })
}

/// What examples are made of.
fn any_parts() -> impl Strategy<Value = Vec<(Sequence, [Sequence; 2], bool)>> {
    prop::collection::vec((any_sequence(), [any_sequence(), any_sequence()], any::<bool>()), 1..9)
}

fn dpo(beta: f64, label_smoothing: f64) -> Loss {
    Loss::Dpo(Dpo { beta: Positive::constant(beta), label_smoothing: Smoothing::constant(label_smoothing) })
}

fn loss_of(loss: &Loss, example: Scored) -> f64 {
    total(loss, &[example], &loss.update(&[example], 0.0))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Central differences with a step of 1e-5. Rounding of losses up to 1e4 leaves 1e-7 in them; truncation is worst
    /// in the odds of one token of 0.02 nats, whose third derivative of 2.5e5 leaves 1e-7 of the slope.
    #[test]
    fn slopes_are_derivatives(parts in any_parts(), elsewhere in 0usize..5, kl in 0.0..3.0) {
        for loss in losses() {
            let examples: Vec<Scored> = parts.iter().map(|&(p, sides, label)| example(&loss, p, sides, label)).collect();
            let mut update = loss.update(&examples, kl);
            update.examples += elsewhere;
            update.nll_tokens += 10 * elsewhere;
            let slopes = loss.evaluate(&examples, &update).expect("a loss").slopes;
            for (i, slopes) in slopes.into_iter().enumerate() {
                for (side, slope) in [slopes.prompt, slopes.chosen, slopes.rejected].into_iter().enumerate() {
                    let moved = |by: f64| {
                        let mut example = [examples[i]];
                        if let Some(sequence) = sides(&mut example[0])[side] {
                            sequence.logp += by;
                        }
                        // an example's contribution depends on no other example
                        total(&loss, &example, &update)
                    };
                    let step = 1e-5;
                    let numeric = (moved(step) - moved(-step)) / (2.0 * step);
                    prop_assert!((slope - numeric).abs() <= 1e-6 * numeric.abs().max(1.0), "{loss:?}: {slope} {numeric}");
                }
            }
        }
    }

    /// Bit for bit: an update's loss does not know how the update was cut.
    #[test]
    fn parts_are_the_whole(parts in any_parts(), size in 1usize..8, kl in 0.0..3.0) {
        for loss in losses() {
            let examples: Vec<Scored> = parts.iter().map(|&(p, sides, label)| example(&loss, p, sides, label)).collect();
            let update = loss.update(&examples, kl);
            let whole = loss.evaluate(&examples, &update).expect("a loss");
            let mut joined = Evaluated { losses: vec![], slopes: vec![], terms: vec![] };
            for part in examples.chunks(size) {
                let part = loss.evaluate(part, &update).expect("a loss");
                joined.losses.extend(part.losses);
                joined.slopes.extend(part.slopes);
                for (i, (name, values)) in part.terms.into_iter().enumerate() {
                    if joined.terms.len() == i {
                        joined.terms.push((name, vec![]));
                    }
                    joined.terms[i].1.extend(values);
                }
            }
            prop_assert_eq!(joined, whole);
        }
    }

    /// −log σ(m) + log σ(−m) = −m: exchanged, the pair has the opposite margin.
    #[test]
    fn exchanging_the_sides_negates_dpos_margin(a in any_sequence(), b in any_sequence(), beta in 0.01..2.0) {
        let loss = dpo(beta, 0.0);
        let reward = |sequence| loss.reward(sequence).expect("a reward");
        let margin = reward(&a) - reward(&b);
        close(loss_of(&loss, pair(b, a)) - loss_of(&loss, pair(a, b)), margin, 1e-12);
    }

    #[test]
    fn no_margin_costs_ln_2(a in any_sequence(), beta in 0.01..2.0, smoothing in 0.0..0.49) {
        close(loss_of(&dpo(beta, smoothing), pair(a, a)), LN_2, 1e-15);
    }

    /// cDPO is what DPO costs on average if labels are wrong with probability ε; at 0 it is DPO.
    #[test]
    fn smoothing_expects_wrong_labels(a in any_sequence(), b in any_sequence(), smoothing in 0.0..0.49) {
        let (right, wrong) = (loss_of(&dpo(0.3, 0.0), pair(a, b)), loss_of(&dpo(0.3, 0.0), pair(b, a)));
        close(loss_of(&dpo(0.3, smoothing), pair(a, b)), (1.0 - smoothing) * right + smoothing * wrong, 1e-12);
    }

    #[test]
    fn ipo_is_least_at_its_target(a in any_sequence(), b in any_sequence(), beta in 0.05..2.0, away in 0.01..50.0) {
        let ipo = Ipo { beta: Positive::constant(beta), reduction: Reduction::Sum };
        // puts the margin at `distance` from the target
        let at = |distance: f64| {
            let margin = ipo.target() + distance;
            pair(Sequence { logp: margin + a.reference.expect("scored") + b.logp - b.reference.expect("scored"), ..a }, b)
        };
        let loss = Loss::Ipo(ipo.clone());
        // log-probabilities of up to 1200 leave 1e-13 of them in the margin
        prop_assert!(loss_of(&loss, at(0.0)) < 1e-24);
        close(loss_of(&loss, at(away)), away * away, 1e-9);
        close(loss_of(&loss, at(-away)), away * away, 1e-9);
    }
}
