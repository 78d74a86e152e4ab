//! Shapes of a run that are known to be bad, and what to do about each.
//!
//! The thresholds are rules of thumb, meant to be silent on a run that went well and to name the usual accidents; each
//! has its reason beside it. Those that an evaluation goes by too are in [`health`].

use serde::Serialize;

use super::history::History;
use super::run::{Run, WinRate};
use super::ticks::{number, percent};
use crate::eval::{Level, health};
use crate::statistics::mean;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it came out.
    pub level: Level,
    /// What was seen, with numbers.
    pub seen: String,
    /// What it means and what to do; empty where nothing has to be.
    pub remedy: &'static str,
}

/// Everything that can be checked on what there is.
#[must_use]
pub fn checks(run: &Run) -> Vec<Check> {
    let history = &run.history;
    let checks = [
        finite(history),
        learned(history),
        loss(history),
        by_heart(history),
        saturated(history),
        chosen(history),
        distance(history),
        gradients(history),
        lengths(run),
    ];
    let mut checks: Vec<Check> = checks.into_iter().flatten().collect();
    // the worst first; the order above within a level
    checks.sort_by_key(|check| std::cmp::Reverse(check.level));
    checks
}

/// The mean of the values after a share of the run.
fn mean_after(points: &[(f64, f64)], share: f64) -> Option<f64> {
    let rest: Vec<f64> = points.iter().skip((points.len() as f64 * share) as usize).map(|(_, y)| *y).collect();
    (!rest.is_empty()).then(|| mean(&rest))
}

/// Enough updates to see a shape.
const ENOUGH: usize = 20;

fn finite(history: &History) -> Option<Check> {
    let (name, level) = ("Numbers are finite", Level::Bad);
    let Some((step, metric)) = history.not_finite().first() else {
        return (history.step() > 0).then(|| Check {
            name,
            level: Level::Good,
            seen: "Every number of every update is finite.".into(),
            remedy: "",
        });
    };
    Some(Check {
        name: "A number is not finite",
        level,
        seen: format!("{metric} was not a number at update {step}."),
        remedy: "What was computed after it is not to be trusted. Lower the learning rate, or look at the rows of that \
                 update.",
    })
}

/// Whether the margin rose at all.
fn learned(history: &History) -> Option<Check> {
    let (before, after) = history.before_and_after("rewards/margins");
    let (before, after) = (before?, after?);
    let by = after - before;
    if by > 0.0 {
        return Some(Check {
            name: "Held-out margin rises",
            level: Level::Good,
            seen: format!("From {} to {}.", number(before), number(after)),
            remedy: "",
        });
    }
    Some(Check {
        name: "The held-out margin did not rise",
        level: Level::Bad,
        seen: format!("It went from {} to {}.", number(before), number(after)),
        remedy: "What is trained does not carry over: raise the learning rate or the number of updates, and check that \
                 chosen and rejected are not the wrong way round.",
    })
}

/// Whether the loss rises.
fn loss(history: &History) -> Option<Check> {
    let held = history.held_out("loss");
    if held.len() >= 2 {
        let (first, last) = (held[0].1, held[held.len() - 1].1);
        let best = held.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
        // a few hundredths are within what another order of the rows would change
        let rise = last - best.1;
        if last > first + 0.01 * first.abs() {
            return Some(Check {
                name: "The held-out loss rose",
                level: Level::Bad,
                seen: format!("It is {} and was {} before training.", number(last), number(first)),
                remedy: "The policy is worse than its start on pairs that it did not see. Lower the learning rate (a third \
                         is a good step), or train on fewer epochs.",
            });
        }
        if rise > 0.02 + 0.05 * best.1.abs() {
            return Some(Check {
                name: "The held-out loss rises again",
                level: Level::Watch,
                seen: format!("It was lowest at update {}, {}, and is {}.", best.0, number(best.1), number(last)),
                remedy: "What comes after the lowest point is learned by heart. End there: fewer epochs, or a checkpoint \
                         from near it.",
            });
        }
        return Some(Check {
            name: "Held-out loss falls",
            level: Level::Good,
            seen: format!("From {} to {}.", number(first), number(last)),
            remedy: "",
        });
    }
    let train = history.get("loss");
    if train.len() < ENOUGH {
        return None;
    }
    let (begin, end) = (mean_after(&train[..train.len() / 5], 0.0)?, mean_after(train, 0.8)?);
    if end > begin + 0.05 * begin.abs() {
        return Some(Check {
            name: "The loss rises",
            level: Level::Bad,
            seen: format!(
                "The last fifth of the updates has {} on average, the first had {}.",
                number(end),
                number(begin)
            ),
            remedy: "The learning rate is too high: try a third of it, or a longer warm-up.",
        });
    }
    Some(Check {
        name: "Loss falls",
        level: Level::Good,
        seen: format!("From {} to {} on average.", number(begin), number(end)),
        remedy: "",
    })
}

/// Whether training pairs are known much better than others.
fn by_heart(history: &History) -> Option<Check> {
    let train = history.get("rewards/accuracies");
    let (_, held) = history.before_and_after("rewards/accuracies");
    let (train, held) = (mean_after(train, 0.75).filter(|_| train.len() >= ENOUGH)?, held?);
    // ten points are beyond the noise of a few hundred pairs
    let level = match train - held {
        gap if gap > 0.25 => Level::Bad,
        gap if gap > 0.1 => Level::Watch,
        _ => Level::Good,
    };
    let seen = format!("Accuracy is {} on training pairs and {} on held-out ones.", percent(train), percent(held));
    let (name, remedy) = match level {
        Level::Good => ("Training and held-out pairs agree", ""),
        _ => (
            "The training pairs are learned by heart",
            "Fewer epochs, a larger beta, a lower rank or learning rate, or more data.",
        ),
    };
    Some(Check { name, level, seen, remedy })
}

/// Whether there was nothing to learn for a long time.
fn saturated(history: &History) -> Option<Check> {
    let accuracy = history.get("rewards/accuracies");
    if accuracy.len() < ENOUGH {
        return None;
    }
    // all right for half of the run, and the loss so small that hardly any gradient is left
    let idle = accuracy[accuracy.len() / 2..].iter().all(|(_, share)| *share >= 0.999);
    let loss = mean_after(history.get("loss"), 0.5)?;
    if idle && loss < 0.02 {
        return Some(Check {
            name: "Accuracy is saturated",
            level: Level::Watch,
            seen: format!(
                "Every training pair was right in the second half of the run, with a loss of {}.",
                number(loss)
            ),
            remedy: "The pairs are too easy or seen too often; further updates only move the policy away from the reference. \
                     Fewer epochs, or a larger beta.",
        });
    }
    Some(Check {
        name: "There is something left to learn",
        level: Level::Good,
        seen: format!("Mean loss of the second half: {}.", number(loss)),
        remedy: "",
    })
}

/// Whether the chosen answers become unlikely.
fn chosen(history: &History) -> Option<Check> {
    let (before, after) = history.before_and_after("perplexity");
    // perplexity is of the chosen answers, so its logarithm is their loss of log-probability a token
    let fell = after?.ln() - before?.ln();
    let (margin_before, margin_after) = history.before_and_after("rewards/margins");
    // not known where there are no rejected answers, or no rewards
    let rose = margin_after.zip(margin_before).map(|(after, before)| after > before);
    // a tenth of a nat makes a token 10 % less likely; half a nat, 40 %
    let level = match fell {
        fell if fell > health::CHOSEN_COLLAPSE => Level::Bad,
        fell if fell > health::CHOSEN_DROP || (fell > 0.02 && rose == Some(false)) => Level::Watch,
        _ => Level::Good,
    };
    let by = number(fell.abs());
    let seen = match fell > 0.0 {
        true => format!("The chosen answers lost {by} nats a token."),
        false => format!("The chosen answers gained {by} nats a token."),
    };
    Some(match level {
        Level::Good if fell > 0.0 && rose == Some(true) => Check {
            name: "Chosen answers stay likely",
            level,
            seen: format!(
                "{seen} That is normal: only the distance to the rejected answers is trained, and those fell further."
            ),
            remedy: "",
        },
        Level::Good => Check { name: "Chosen answers stay likely", level, seen, remedy: "" },
        Level::Watch => Check {
            name: "Chosen answers become less likely",
            level,
            seen,
            remedy: match (rose, history.has_rewards()) {
                (Some(true), _) => {
                    "A small fall is normal, as only the distance to the rejected answers is trained; this one is larger. \
                     Read the samples. A larger beta, a lower learning rate or fewer epochs hold the policy nearer."
                }
                (_, true) => {
                    "Read the samples. A larger beta, a lower learning rate or fewer epochs hold the policy nearer."
                }
                (_, false) => "Read the samples. A lower learning rate or fewer epochs hold the policy nearer.",
            },
        },
        Level::Bad => Check {
            name: "The chosen answers collapse",
            level,
            seen,
            remedy: match (rose, history.has_rewards()) {
                (Some(true), _) => {
                    "The policy wins by unlearning both answers. Raise beta, lower the learning rate, or keep the \
                     likelihood in the loss: [loss.orpo], or [loss.sft] first."
                }
                (_, true) => {
                    "The policy unlearns them. Raise beta, lower the learning rate, or keep the likelihood in the loss: \
                     [loss.orpo], or [loss.sft] first."
                }
                (_, false) => "The policy unlearns them. Lower the learning rate, or train on fewer epochs.",
            },
        },
    })
}

/// Whether the policy runs away from the reference.
fn distance(history: &History) -> Option<Check> {
    let (_, after) = history.before_and_after("kl_to_reference");
    let after = after?;
    // ½ (log ratio)² of 1 is a token whose probability changed fourfold, of 5 one that changed twentyfold
    let level = match after {
        kl if kl > 5.0 => Level::Bad,
        kl if kl > 1.0 => Level::Watch,
        _ => Level::Good,
    };
    let seen = format!("{} nats a token on held-out answers.", number(after));
    Some(match level {
        Level::Good => Check { name: "Stays near the reference", level, seen, remedy: "" },
        _ => Check {
            name: "The policy runs away from the reference",
            level,
            seen,
            remedy: match history.has_rewards() {
                true => {
                    "Expect odd or repetitive answers: read the samples. Raise beta, lower the learning rate, or train on \
                     fewer epochs."
                }
                false => {
                    "Expect odd or repetitive answers: read the samples. Lower the learning rate, or train on fewer \
                     epochs."
                }
            },
        },
    })
}

/// Whether single updates were far stronger than the others.
fn gradients(history: &History) -> Option<Check> {
    let norms = history.get("grad_norm");
    if norms.len() < ENOUGH {
        return None;
    }
    // by pieces: late in a run, when most pairs are learned, norms are lower than early
    let mut spikes: Vec<(f64, f64)> = Vec::new();
    for piece in norms.chunks(norms.len().div_ceil(4).max(ENOUGH / 2)) {
        let mut sorted: Vec<f64> = piece.iter().map(|(_, norm)| *norm).collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted[sorted.len() / 2];
        spikes.extend(piece.iter().copied().filter(|(_, norm)| *norm > 20.0 * middle && *norm > 1.0));
    }
    let Some(worst) = spikes.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        let highest = norms.iter().map(|(_, norm)| *norm).fold(0.0, f64::max);
        return Some(Check {
            name: "Gradients are steady",
            level: Level::Good,
            seen: format!("The highest norm is {}.", number(highest)),
            remedy: "",
        });
    };
    let many = spikes.len() >= 3 && spikes.len() * 50 > norms.len();
    Some(Check {
        name: "Gradients have spikes",
        level: if many { Level::Bad } else { Level::Watch },
        seen: format!(
            "{} of {} updates had a gradient of more than twenty times the usual norm, the highest {} at update {}.",
            spikes.len(),
            norms.len(),
            number(worst.1),
            worst.0
        ),
        remedy: "A few come from odd rows, and clipping ([train] max_grad_norm) takes their force. Many mean too high a \
                 learning rate, or rows that are broken.",
    })
}

/// Whether the policy's answers became much longer or shorter, by a judge's prompts or else by the samples.
fn lengths(run: &Run) -> Option<Check> {
    // an evaluation knows more of it, and one fault counts once
    if run.eval.iter().flat_map(|eval| &eval.checks).any(|check| check.name == health::LENGTH) {
        return None;
    }
    let judged = run.own_win_rates().filter(|win_rate| win_rate.is_against_base()).find_map(|win_rate: &WinRate| {
        let lengths = &win_rate.lengths;
        let tokens = lengths.policy_tokens.zip(lengths.against_tokens);
        let (policy, against) = tokens.or(lengths.policy_chars.zip(lengths.against_chars))?;
        Some((policy / against, format!("over {} prompts", win_rate.prompts)))
    });
    let (ratio, over) = match judged {
        Some(judged) => judged,
        None => {
            let count = |of: fn(&super::run::Sample) -> &String| -> usize {
                run.samples.iter().map(|sample| of(sample).chars().count()).sum()
            };
            let (policy, base) = (count(|sample| &sample.policy), count(|sample| &sample.base));
            if run.samples.is_empty() || base == 0 {
                return None;
            }
            (policy as f64 / base as f64, format!("over {} sample prompts", run.samples.len()))
        }
    };
    let seen = format!("The policy's answers are {} times as long as the base's, {over}.", number(ratio));
    // preference data favours the longer answer; a judge does too
    Some(match ratio {
        ratio if ratio > health::LENGTH_EXPLODES => Check {
            name: "Answers explode in length",
            level: Level::Bad,
            seen,
            remedy: match run.history.has_rewards() {
                true => {
                    "The policy learned that longer is better. Look whether chosen answers are longer than rejected ones \
                     in the data; [loss.ipo], which counts by token, a larger beta, or balanced rows help."
                }
                false => "Look whether the answers in the data are so long, and whether the policy's end at all.",
            },
        },
        ratio if ratio > health::LENGTH_DRIFT => Check {
            name: "Answers become longer",
            level: Level::Watch,
            seen,
            remedy: "Some of what a judge likes may be the length alone: look at the length-controlled win rate.",
        },
        ratio if ratio < 1.0 / health::LENGTH_DRIFT => Check {
            name: "Answers become much shorter",
            level: Level::Watch,
            seen,
            remedy: "Read the samples: is it what was wanted, or does the policy break off?",
        },
        _ => Check { name: "Length of answers is kept", level: Level::Good, seen, remedy: "" },
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::run::{EvalCheck, EvalFile, Lengths, Sample, State, WinRate};

    /// A made-up run of 100 updates that goes as it should, changed by `f(name, share of the run, value)`.
    pub(in crate::report) fn run(change: impl Fn(&str, f64, f64) -> f64) -> Run {
        let mut history = History::default();
        for step in 0..=100u64 {
            let t = step as f64 / 100.0;
            let mut push = |name: &str, value: f64| history.push(name, step, change(name, t, value));
            if step % 25 == 0 {
                push("eval_loss", 0.693 - 0.3 * t);
                push("eval_rewards/margins", 1.5 * t);
                push("eval_rewards/accuracies", if step == 0 { 0.0 } else { 0.6 + 0.15 * t });
                push("eval_perplexity", 3.0 + 0.1 * t);
                push("eval_kl_to_reference", 0.2 * t);
            }
            if step > 0 {
                push("loss", 0.693 - 0.35 * t + 0.05 * (step as f64).sin());
                push("rewards/accuracies", 0.5 + 0.3 * t);
                push("grad_norm", 2.0 + (step as f64).cos());
            }
        }
        let sample = Sample {
            prompt: "p".into(),
            base: "twelve chars".into(),
            policy: "eleven char".into(),
            ..Sample::default()
        };
        Run {
            name: "run".into(),
            state: State::Finished,
            history,
            recipe: None,
            recipe_text: String::new(),
            summary: serde_json::Value::Null,
            samples: vec![sample],
            margins: Default::default(),
            win_rates: Vec::new(),
            eval: None,
            unreadable: Vec::new(),
        }
    }

    fn worst(run: &Run) -> (Level, &'static str) {
        checks(run).first().map(|check| (check.level, check.name)).expect("checks")
    }

    #[test]
    fn a_good_run_is_good_in_everything() {
        let found = checks(&run(|_, _, value| value));
        assert!(found.iter().all(|check| check.level == Level::Good && check.remedy.is_empty()), "{found:#?}");
        assert_eq!(found.len(), 9);
    }

    /// Each bad shape is named, and is the only thing that is.
    #[test]
    fn each_bad_shape_is_named() {
        type Change = fn(&str, f64, f64) -> f64;
        let of: [(&str, Level, Change); 12] = [
            ("The chosen answers collapse", Level::Bad, |name, t, value| {
                if name == "eval_perplexity" { value * (1.0 + 2.0 * t) } else { value }
            }),
            ("Chosen answers become less likely", Level::Watch, |name, t, value| {
                if name == "eval_perplexity" { value * (1.0 + 0.3 * t) } else { value }
            }),
            ("Accuracy is saturated", Level::Watch, |name, t, value| match name {
                "rewards/accuracies" | "eval_rewards/accuracies" => f64::from(t > 0.2),
                "loss" => 0.69 * (-20.0 * t).exp(),
                _ => value,
            }),
            ("The training pairs are learned by heart", Level::Watch, |name, t, value| {
                if name == "rewards/accuracies" { 0.5 + 0.45 * t } else { value }
            }),
            ("The training pairs are learned by heart", Level::Bad, |name, t, value| match name {
                "rewards/accuracies" => 0.5 + 0.5 * t,
                "eval_rewards/accuracies" => 0.55,
                _ => value,
            }),
            (
                "The held-out loss rose",
                Level::Bad,
                |name, t, value| {
                    if name == "eval_loss" { 0.693 + 0.4 * t } else { value }
                },
            ),
            ("The held-out loss rises again", Level::Watch, |name, t, value| {
                if name == "eval_loss" { 0.6 + (t - 0.5).powi(2) * 0.4 } else { value }
            }),
            (
                "Gradients have spikes",
                Level::Watch,
                |name, t, value| {
                    if name == "grad_norm" && t == 0.5 { 300.0 } else { value }
                },
            ),
            ("Gradients have spikes", Level::Bad, |name, t, value| {
                if name == "grad_norm" && (t * 100.0) as u64 % 20 == 3 { 300.0 } else { value }
            }),
            ("The policy runs away from the reference", Level::Watch, |name, t, value| {
                if name == "eval_kl_to_reference" { 2.0 * t } else { value }
            }),
            ("The policy runs away from the reference", Level::Bad, |name, t, value| {
                if name == "eval_kl_to_reference" { 9.0 * t } else { value }
            }),
            ("The held-out margin did not rise", Level::Bad, |name, t, value| match name {
                "eval_rewards/margins" => -0.1 * t,
                "eval_perplexity" => 3.0,
                _ => value,
            }),
        ];
        for (name, level, change) in of {
            let run = run(change);
            assert_eq!(worst(&run), (level, name));
            let others: Vec<_> = checks(&run).into_iter().skip(1).filter(|c| c.level != Level::Good).collect();
            assert!(others.is_empty(), "{name}: {others:#?}");
            assert!(!checks(&run)[0].remedy.is_empty());
        }
    }

    #[test]
    fn a_rising_training_loss_is_named_where_nothing_is_held_out() {
        let mut bad = run(|name, t, value| if name == "loss" { 0.7 + t } else { value });
        let text: Vec<String> = (1..=100)
            .map(|step| format!("{{\"step\":{step},\"epoch\":0,\"loss\":{}}}", bad.history.get("loss")[step - 1].1))
            .collect();
        bad.history = History::parse(&text.join("\n"));
        assert_eq!(worst(&bad), (Level::Bad, "The loss rises"));
    }

    #[test]
    fn numbers_that_are_none_are_named() {
        let mut bad = run(|_, _, value| value);
        bad.history = History::parse("{\"step\":3,\"epoch\":0,\"loss\":null}");
        assert_eq!(worst(&bad), (Level::Bad, "A number is not finite"));
        assert!(checks(&bad)[0].seen.contains("update 3"));
    }

    #[test]
    fn lengths_are_those_of_the_judge_or_of_the_samples() {
        let mut long = run(|_, _, value| value);
        long.samples[0].policy = "a".repeat(100);
        assert_eq!(worst(&long), (Level::Bad, "Answers explode in length"));
        let lengths = Lengths { policy_tokens: Some(160.0), against_tokens: Some(100.0), ..Lengths::default() };
        long.win_rates = vec![WinRate { lengths, against: "base".into(), ..WinRate::default() }];
        assert_eq!(worst(&long), (Level::Watch, "Answers become longer"));
        long.win_rates[0].lengths.policy_tokens = Some(30.0);
        assert_eq!(worst(&long), (Level::Watch, "Answers become much shorter"));
        // another adapter's answers are not the base's, and a checkpoint's are not the run's
        for (folder, against) in [("other-by-x", "other"), ("step-000050-vs-base-by-x", "base")] {
            (long.win_rates[0].folder, long.win_rates[0].against) = (folder.into(), against.into());
            assert_eq!(worst(&long), (Level::Bad, "Answers explode in length"), "by the samples");
        }
        // what an evaluation says of it is shown with it
        let check = EvalCheck { name: health::LENGTH.into(), verdict: "bad".into(), ..EvalCheck::default() };
        long.eval = Some(EvalFile { checks: vec![check], ..EvalFile::default() });
        assert_eq!(worst(&long).0, Level::Good);
    }

    /// A made-up run whose chosen answers lose `nats` a token by its end.
    fn losing(nats: f64, change: impl Fn(&str, f64, f64) -> f64) -> Check {
        let run = run(
            |name, t, value| {
                if name == "eval_perplexity" { 3.0 * (nats * t).exp() } else { change(name, t, value) }
            },
        );
        let found = checks(&run).into_iter().find(|check| check.name.to_lowercase().contains("chosen answers"));
        found.expect("a check")
    }

    #[test]
    fn only_a_margin_that_rose_excuses_a_fall_of_the_chosen_answers() {
        let rose = losing(0.01, |_, _, value| value);
        assert!(rose.level == Level::Good && rose.seen.contains("those fell further"), "{rose:?}");
        let fell = losing(0.01, |name, t, value| if name == "eval_rewards/margins" { -t } else { value });
        assert!(fell.level == Level::Good && !fell.seen.contains("normal"), "{fell:?}");
    }

    /// Fine-tuning has neither rejected answers nor a beta.
    #[test]
    fn fine_tuning_is_not_told_of_margins_and_beta() {
        for nats in [0.05, 0.3, 0.8] {
            let mut run = run(|name, t, value| match name {
                "eval_perplexity" => 3.0 * (nats * t).exp(),
                "eval_kl_to_reference" => 9.0 * t,
                _ => value,
            });
            let mut history = History::default();
            for name in ["eval_perplexity", "eval_kl_to_reference"] {
                run.history.get(name).iter().for_each(|(step, value)| history.push(name, *step as u64, *value));
            }
            run.history = history;
            run.samples[0].policy = "a".repeat(100);
            let found = checks(&run);
            assert!(found.len() >= 4, "{found:#?}");
            for check in &found {
                let said = format!("{} {}", check.seen, check.remedy);
                assert!(!said.contains("beta") && !said.contains("rejected"), "{said}");
            }
        }
    }

    #[test]
    fn what_is_not_there_is_not_checked() {
        let mut empty = run(|_, _, value| value);
        empty.history = History::default();
        empty.samples.clear();
        assert!(checks(&empty).is_empty());
    }
}
