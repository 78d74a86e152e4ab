//! `dpo-lora win-rate`: both sides answer, a judge compares, and the result says how sure it is.

mod answers;
mod judging;
mod place;

use std::io::Write;

use miette::miette;
use serde_json::{Value, json};

use self::answers::Request;
use self::judging::Judging;
use self::place::{Answers, Place};
use super::{Failure, failed, of_stdout, print_json, request};
use crate::cli::{self, Stage};
use crate::interrupt::Interrupt;
use crate::judge::config::JudgeError;
use crate::judge::log::Log;
use crate::judge::outputs::Output;
use crate::judge::report::{About, Judged, Names, Pair, Report, Said, Sample, Settings};
use crate::judge::{Calls, EndpointJudge, Judge, JudgeConfig, readability};
use crate::progress::Console;
use crate::statistics::{Bootstrap, Order, Scale, Votes};

/// Has both sides answer and compared.
///
/// # Errors
/// See [`Failure`].
pub fn win_rate(arguments: &cli::WinRate) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let interrupt =
        Interrupt::listen().map_err(|e| Failure::Failed(miette!("signals cannot be listened to: {e}")))?;
    if let Some((name, with)) = ignored(arguments) {
        return Err(Failure::Request(miette!(
            help = format!("leave {name} out, or make answers too: `--stage generate`, or no --stage"),
            "{name} is about answers that are to be made, and {with} makes none"
        )));
    }
    answers::check(arguments)?;
    let named = judge(&arguments.judge).map_err(request)?;
    let place = Place::of(arguments, named.as_ref().map(|(judge, _)| judge))?;
    let does = |stage| arguments.stage.is_none_or(|only| only == stage);
    if named.is_none() && does(Stage::Judge) {
        return Err(request(JudgeError::None));
    }
    // what can be wrong with the request, before the judge is asked; the judge, before any weight is read
    let asked = if does(Stage::Generate) { Some(Request::new(arguments, &console)?) } else { None };
    if let (Some(asked), Some((Judge::Endpoint(judge), _)), true) = (&asked, &named, does(Stage::Judge)) {
        judging::check_references(judge, asked.references())?;
    }
    let mut judging = match &named {
        Some((Judge::Endpoint(judge), Some(calls))) if does(Stage::Judge) => {
            Some(Judging::new(judge, calls, arguments, &place, &console, &interrupt)?)
        }
        _ => None,
    };
    if let Some(asked) = asked {
        place.make()?;
        asked.answer(arguments, &place, &console, &interrupt)?;
    }
    if let (Some((judge, _)), true) = (&named, does(Stage::Judge)) {
        let (policy, against, _) = place.read_answers()?;
        place.write_judge(judge)?;
        if let Some(judging) = &mut judging {
            judging.judge(&paired(&policy, &against), arguments.judge.refresh, &console, &interrupt)?;
        }
    }
    drop(judging);
    if does(Stage::Report) {
        report(arguments, named.map(|(judge, _)| judge), &place, &console)?;
    } else {
        console.line(format_args!("\nkept in {}", place.path().display()));
    }
    Ok(())
}

/// What is said after a signal, where answers were kept.
fn interrupted(code: u8, console: &Console) -> Failure {
    console.line("\ninterrupted; what was answered is kept, and the same command goes on");
    Failure::Interrupted(code)
}

/// An argument that would change nothing, with the stage that makes no answers.
fn ignored(arguments: &cli::WinRate) -> Option<(&'static str, &'static str)> {
    let with = match arguments.stage? {
        Stage::Generate => return None,
        Stage::Judge => "--stage judge",
        Stage::Report => "--stage report",
    };
    Some((arguments.about_answers()?, with))
}

/// The judge that is named, and how it is called.
fn judge(arguments: &cli::JudgeArguments) -> Result<Option<(Judge, Option<Calls>)>, JudgeError> {
    let config = arguments.judge.as_deref().map(JudgeConfig::find).transpose()?;
    let cli::JudgeArguments { judge_url, judge_model, judge_key_env, judge_prompt, .. } = arguments;
    if config == Some(None) {
        let given = [
            ("--judge-url", judge_url.is_some()),
            ("--judge-model", judge_model.is_some()),
            ("--judge-key-env", judge_key_env.is_some()),
            ("--judge-prompt", judge_prompt.is_some()),
            ("--verdict", arguments.verdict.is_some()),
            ("--price", arguments.price.is_some()),
            ("--concurrency", arguments.concurrency.is_some()),
            ("--rpm", arguments.rpm.is_some()),
            ("--tpm", arguments.tpm.is_some()),
            ("--max-calls", arguments.max_calls.is_some()),
            ("--max-cost", arguments.max_cost.is_some()),
            ("--refresh", arguments.refresh),
        ];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => Err(JudgeError::NoEndpoint(name)),
            None => Ok(Some((Judge::Readability, None))),
        };
    }
    if config.is_none() && judge_url.is_none() && judge_model.is_none() {
        return Ok(None);
    }
    let mut config = config.flatten().unwrap_or_default();
    let text = |given: &Option<String>, own: Option<String>| given.clone().or(own);
    config.base_url = text(judge_url, config.base_url);
    config.model = text(judge_model, config.model);
    config.api_key_env = text(judge_key_env, config.api_key_env);
    config.prompt = text(judge_prompt, config.prompt);
    config.verdict = arguments.verdict.or(config.verdict);
    config.price = arguments.price.or(config.price);
    config.concurrency = arguments.concurrency.or(config.concurrency);
    config.rpm = arguments.rpm.or(config.rpm);
    config.tpm = arguments.tpm.or(config.tpm);
    if arguments.max_cost.is_some() && config.price.is_none() {
        return Err(JudgeError::NoPrice);
    }
    let (judge, calls): (EndpointJudge, Calls) = config.resolve()?;
    Ok(Some((Judge::Endpoint(Box::new(judge)), Some(calls))))
}

fn paired<'o>(policy: &'o [Output], against: &'o [Output]) -> Vec<Pair<'o>> {
    policy.iter().zip(against).map(|(policy, against)| Pair { policy, against }).collect()
}

/// Writes what the verdicts come to, and says it.
fn report(arguments: &cli::WinRate, named: Option<Judge>, place: &Place, console: &Console) -> Result<(), Failure> {
    let (policy, against, answers) = place.read_answers()?;
    let judge = match named {
        Some(named) => named.with_price_of(place.read_judge().ok()),
        None => place.read_judge()?,
    };
    let pairs = paired(&policy, &against);
    let (judged, cost) = match &judge {
        Judge::Readability => (pairs.iter().map(readable).collect::<Vec<_>>(), None),
        Judge::Endpoint(judge) => {
            let entries = Log::read(&place.judgements()).map_err(failed)?;
            let (judged, cost) = judging::read(judge, &pairs, &entries)?;
            (judged, Some(cost))
        }
    };
    let settings = Settings {
        bootstrap: Bootstrap { seed: answers.seed, ..Bootstrap::default() },
        allow_single_order: arguments.allow_single_order,
        by_model: judge.is_model(),
        max_unresolved: arguments.max_invalid,
    };
    let names = Names { policy: answers.policy.clone(), against: answers.against.clone(), judge: judge.name() };
    let about = About {
        judge: judge.json(),
        sampling: answers.sampling.clone(),
        hashes: answers.hashes.clone(),
        cost,
        warnings: self_preference(&judge, &answers).into_iter().collect(),
    };
    let report = Report::new(&pairs, &judged, &names, &settings, about);
    place.write_json("annotations.json", &annotations(&pairs, &report, &judge))?;
    place.write_json("win_rate.json", &report)?;
    tell(&report, place, console);
    if arguments.json {
        let mut value = serde_json::to_value(&report).map_err(|e| Failure::Failed(miette!("{e}")))?;
        if let Some(object) = value.as_object_mut() {
            object.remove("samples");
        }
        print_json(&value)?;
    } else {
        writeln!(std::io::stdout(), "{}", report.headline).map_err(of_stdout)?;
    }
    if report.unresolved_share() > settings.max_unresolved {
        return Err(Failure::Failed(miette!(
            help = "judgements.jsonl has what the judge said; the same command asks for what is missing, --refresh asks \
                    again what could not be understood, and --max-invalid allows more",
            "{} of {} prompts have no verdict",
            report.unresolved(),
            report.prompts
        )));
    }
    match arguments.fail_under {
        Some(gate) => {
            let (value, what) = match gate.of_interval {
                true => (report.win_rate.interval[0], "the lower end of the interval"),
                false => (report.win_rate.estimate, "the win rate"),
            };
            // not `<`: what is not a number does not pass
            if value >= gate.least {
                return Ok(());
            }
            console.line(format_args!("{what} is {:.1} %, below {:.1} %", 100.0 * value, 100.0 * gate.least));
            Err(Failure::Gate)
        }
        None => Ok(()),
    }
}

/// The verdict of the judge that needs no model.
fn readable(pair: &Pair<'_>) -> Judged {
    if pair.is_identical() {
        return Judged::Identical;
    }
    match readability::compare(&pair.policy.output, &pair.against.output) {
        Some((verdict, reason)) => {
            let vote = Order::PolicyFirst.policy(verdict.vote(Scale::Three));
            let said = Said { order: 1, verdict: verdict.name().to_owned(), reason: Some(reason) };
            // the same in the other order, by its making
            Judged::Votes(Votes { first: Some(vote), second: Some(vote) }, vec![said])
        }
        None => {
            let reason = "there are no words in it, or most are not in the Latin script".to_owned();
            let said = Said { order: 1, verdict: "invalid".into(), reason: Some(reason) };
            Judged::Invalid(Votes::default(), vec![said])
        }
    }
}

/// Verdicts with AlpacaEval's columns: `output_1` is the base's, and a preference of 2 is all for the policy.
fn annotations(pairs: &[Pair<'_>], report: &Report, judge: &Judge) -> Value {
    let row = |(pair, sample): (&Pair<'_>, &Sample)| {
        let raw: Vec<&str> = sample.verdicts.iter().map(|said| said.verdict.as_str()).collect();
        json!({
            "instruction": pair.policy.instruction,
            "output_1": pair.against.output,
            "generator_1": pair.against.generator,
            "output_2": pair.policy.output,
            "generator_2": pair.policy.generator,
            "dataset": sample.category,
            "annotator": judge.name(),
            "preference": sample.score.map(|score| 1.0 + score),
            "preference_raw_completion": raw.join(" | "),
        })
    };
    pairs.iter().zip(&report.samples).map(row).collect()
}

fn tell(report: &Report, place: &Place, console: &Console) {
    console.line("");
    if report.scored > 0 {
        tell_numbers(report, console);
    }
    for warning in &report.warnings {
        console.warning(warning);
    }
    let verdict = match report.win_rate.against(0.5) {
        _ if report.scored == 0 => "no prompt has a verdict, so nothing is shown".to_owned(),
        std::cmp::Ordering::Greater => format!("better than {}, by this judge", report.against),
        std::cmp::Ordering::Less => format!("worse than {}, by this judge", report.against),
        std::cmp::Ordering::Equal if report.detectable > 0.0 => format!(
            "no difference to {} is shown; so many prompts would mostly show one of {:.0} points",
            report.against,
            100.0 * report.detectable
        ),
        std::cmp::Ordering::Equal => format!("no difference to {} is shown", report.against),
    };
    console.line(format_args!("\n{verdict}; everything is in {}", place.path().display()));
}

fn tell_numbers(report: &Report, console: &Console) {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let range = |[low, high]: [f64; 2]| format!("{:.1} to {:.1} %", 100.0 * low, 100.0 * high);
    let row = |name: &str, value: String, note: String| {
        console.line(format!("{name:<24}{value:>9}  {note}").trim_end());
    };
    let groups = match report.clusters == report.scored {
        true => format!("{} prompts", report.scored),
        false => format!("{} prompts in {} groups", report.scored, report.clusters),
    };
    row(
        "win rate",
        percent(report.win_rate.estimate),
        format!("95 %: {}, over {groups}", range(report.win_rate.interval)),
    );
    if let Some(controlled) = &report.length_controlled {
        row("at equal length", percent(controlled.estimate), format!("95 %: {}", range(controlled.interval)));
    }
    if let Some(controlled) = &report.style_controlled {
        row("at equal style", percent(controlled.estimate), format!("95 %: {}", range(controlled.interval)));
    }
    if let Some(conservative) = report.conservative {
        row("both orders agree", percent(conservative), "a win or loss takes both".into());
    }
    let shown = format!("{}/{}/{}", report.wins, report.ties, report.losses);
    row("win/tie/loss", shown, format!("sign test p = {:.2e}, {} identical", report.sign_test, report.identical));
    if let Some(orders) = &report.orders {
        let first = orders.first_slot_share.map(|share| format!("the first answer wins {}", percent(share)));
        row("agrees with itself", percent(orders.agreement), first.unwrap_or_default());
    }
    let lengths = &report.lengths;
    let longer = lengths.prefers_longer.map(|share| format!("; the longer one wins {}", percent(share)));
    let note =
        format!("characters, {:.0} of {}{}", lengths.against_chars, report.against, longer.unwrap_or_default());
    row("length", format!("{:.0}", lengths.policy_chars), note);
    for category in report.categories.iter().filter(|_| report.categories.len() > 1) {
        let note = format!("± {:.1}, {} prompts", 196.0 * category.standard_error, category.prompts);
        row(&format!("  {}", category.category), percent(category.estimate), note);
    }
}

/// Models prefer what they would say themselves (Panickssery et al. 2024, arXiv 2404.13076).
fn self_preference(judge: &Judge, answers: &Answers) -> Option<String> {
    let Judge::Endpoint(judge) = judge else { return None };
    let family = |name: &str| -> String {
        let name = name.rsplit('/').next().unwrap_or(name).to_lowercase();
        name.chars().take_while(|c| c.is_ascii_alphabetic()).collect()
    };
    let (own, base) = (family(&judge.model), family(&answers.base));
    (own.len() >= 3 && own == base).then(|| {
        format!(
            "{} judges answers of its own family ({}): models prefer what they would say themselves",
            judge.model, answers.base
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_judge_of_the_familys_own_is_said() {
        let warned = |model: &str, base: &str| {
            let config = JudgeConfig { model: Some(model.into()), ..JudgeConfig::default() };
            let (judge, _) = config.resolve().expect("a judge");
            let nothing = Value::Null;
            let answers = Answers {
                schema: 1,
                policy: String::new(),
                against: String::new(),
                base: base.into(),
                prompts: nothing.clone(),
                sampling: nothing.clone(),
                hashes: nothing,
                seed: 0,
            };
            self_preference(&Judge::Endpoint(Box::new(judge)), &answers).is_some()
        };
        assert!(warned("qwen3-32b", "Qwen/Qwen3-4B") && warned("meta-llama/Llama-3.3-70B-Instruct", "a/llama-1b"));
        assert!(!warned("gpt-4.1-mini", "Qwen/Qwen3-4B") && !warned("7b", "8b"));
    }
}
