//! The folder of a comparison.

use std::path::{Path, PathBuf};

use miette::{Diagnostic, miette};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::answers::{is_address, name_of};
use super::{Failure, failed, request};
use crate::cli;
use crate::files::{self, cannot_write};
use crate::judge::Judge;
use crate::judge::outputs::{self, Output};

/// ```text
/// OUT/
///   outputs_policy.json  outputs_against.json   answers, in AlpacaEval's form
///   answers.json                                how they were made
///   judge.json                                  who judges, and how
///   judgements.jsonl                            every answer of the judge, as it came
///   annotations.json                            verdicts, with AlpacaEval's columns
///   win_rate.json                               what they come to
/// ```
#[derive(Debug)]
pub(super) struct Place(PathBuf);

/// How the answers were made: `answers.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Answers {
    pub(super) schema: u32,
    pub(super) policy: String,
    pub(super) against: String,
    /// The base, by the name that it has for others.
    pub(super) base: String,
    pub(super) prompts: Value,
    pub(super) sampling: Value,
    pub(super) hashes: Value,
    pub(super) seed: u64,
}

#[derive(Debug, Error, Diagnostic)]
enum PlaceError {
    #[error("no judge is named")]
    #[diagnostic(help(
        "--judge readability needs no network; --judge-model NAME asks a model, --judge FILE one that a file describes; or --out names \
         a comparison that has its judge"
    ))]
    NoName,
    #[error("{} is no run, so --out has to say where the comparison is kept", .0.display())]
    #[diagnostic(help("--out DIR"))]
    NoRun(PathBuf),
    #[error("{}: {problem}", file.display())]
    #[diagnostic(help("{help}"))]
    File { file: PathBuf, problem: String, help: &'static str },
}

impl Place {
    /// `--out`, or `RUN/win-rate/AGAINST-by-JUDGE`, with what answers before it where that is not just the run.
    pub(super) fn of(arguments: &cli::WinRate, judge: Option<&Judge>) -> Result<Self, Failure> {
        if let Some(out) = &arguments.out {
            return Ok(Self(out.clone()));
        }
        let judge = judge.ok_or_else(|| request(PlaceError::NoName))?;
        let Some(first) = arguments.trained.adapters.first() else { return Err(request(PlaceError::NoName)) };
        let absolute = std::path::absolute(first).unwrap_or_else(|_| first.clone());
        // a checkpoint's result is not the run's
        let is_run = |folder: &&Path| folder.join("recipe.resolved.toml").is_file();
        let run =
            absolute.ancestors().take(3).find(is_run).ok_or_else(|| request(PlaceError::NoRun(first.clone())))?;
        let step =
            absolute.strip_prefix(run).ok().and_then(|rest| rest.to_str()).filter(|rest| rest.contains("step-"));
        let policy = match &arguments.trained.adapters[..] {
            [_] => step.and_then(|rest| rest.rsplit('/').next()).map(ToOwned::to_owned),
            several => Some(sum(several, &arguments.trained.weights)),
        };
        let policy = policy.map(|name| format!("{}-vs-", slug(&name))).unwrap_or_default();
        let against = slug(&match &arguments.against_model {
            Some(model) => model.clone(),
            None => against(&arguments.against),
        });
        let run =
            first.ancestors().find(|path| std::path::absolute(path).is_ok_and(|path| path == run)).unwrap_or(run);
        Ok(Self(run.join("win-rate").join(format!("{policy}{against}-by-{}", slug(&judge.short_name())))))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn make(&self) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.0).map_err(|e| failed(cannot_write(&self.0)(e)))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn judgements(&self) -> PathBuf {
        self.file("judgements.jsonl")
    }

    pub(super) fn write_answers(
        &self,
        policy: &[Output],
        against: &[Output],
        answers: &Answers,
    ) -> Result<(), Failure> {
        self.write_json("outputs_policy.json", &policy)?;
        self.write_json("outputs_against.json", &against)?;
        self.write_json("answers.json", answers)
    }

    pub(super) fn has_answers(&self) -> bool {
        ["outputs_policy.json", "outputs_against.json", "answers.json"].iter().all(|name| self.file(name).is_file())
    }

    /// Both sides' answers, in the same order.
    pub(super) fn read_answers(&self) -> Result<(Vec<Output>, Vec<Output>, Answers), Failure> {
        const HELP: &str = "`--stage generate` makes the answers";
        if !self.has_answers() {
            let file = self.file("outputs_policy.json");
            return Err(request(PlaceError::File { file, problem: "there are no answers yet".into(), help: HELP }));
        }
        let read = |name: &str| outputs::read(&self.file(name)).map_err(request);
        let (policy, against) = (read("outputs_policy.json")?, read("outputs_against.json")?);
        let pairs = policy.iter().zip(&against).all(|(one, two)| one.instruction == two.instruction);
        if policy.len() != against.len() || !pairs {
            let file = self.file("outputs_against.json");
            let problem = "does not answer the same prompts as outputs_policy.json, in the same order".into();
            return Err(request(PlaceError::File { file, problem, help: HELP }));
        }
        Ok((policy, against, self.read_json("answers.json", HELP)?))
    }

    pub(super) fn write_judge(&self, judge: &Judge) -> Result<(), Failure> {
        self.write_json("judge.json", judge)
    }

    pub(super) fn read_judge(&self) -> Result<Judge, Failure> {
        self.read_json("judge.json", "`--stage judge` asks a judge")
    }

    pub(super) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value);
        let text = text.map_err(|e| Failure::Failed(miette!("{name} cannot be written as JSON: {e}")))?;
        files::write(&self.file(name), format!("{text}\n").as_bytes()).map_err(failed)
    }

    fn read_json<T: for<'de> Deserialize<'de>>(&self, name: &str, help: &'static str) -> Result<T, Failure> {
        let file = self.file(name);
        let error = |problem: String| request(PlaceError::File { file: file.clone(), problem, help });
        let text = std::fs::read_to_string(&file).map_err(|e| error(crate::tensor_file::describe_io(&e)))?;
        serde_json::from_str(&text).map_err(|e| error(format!("is not what it should be: {e}")))
    }
}

/// Several adapters, with what each is multiplied by where that is said.
fn sum(adapters: &[PathBuf], weights: &[f64]) -> String {
    let weights = weights.iter().map(|weight| format!("-{weight}")).chain(std::iter::repeat(String::new()));
    let names: Vec<String> = adapters.iter().zip(weights).map(|(path, weight)| folder(path) + &weight).collect();
    names.join("-")
}

/// What the policy is compared with: a name that others of its kind do not have.
fn against(against: &str) -> String {
    let path = Path::new(against);
    if against == "base" || is_address(against) || !path.is_file() {
        return folder(path);
    }
    // files of many folders are called `outputs.json`
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_end_matches(".jsonl").trim_end_matches(".json");
    match path.parent().and_then(Path::file_name) {
        Some(folder) => format!("{}-{name}", folder.to_string_lossy()),
        None => name.to_owned(),
    }
}

/// An adapter's folder; a checkpoint's, which other runs have too, with its run.
fn folder(path: &Path) -> String {
    let name = name_of(&[path.to_owned()]);
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let checkpoints = absolute.ancestors().find(|path| path.file_name().is_some_and(|name| name == "checkpoints"));
    match checkpoints.and_then(Path::parent).and_then(Path::file_name) {
        Some(run) => format!("{}-{name}", run.to_string_lossy()),
        None => name,
    }
}

/// A name as part of a file's. Of one that is cut, a hash says the rest.
fn slug(name: &str) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    match plain.trim_matches(['-', '.']) {
        "" => "other".into(),
        plain if plain.len() > 80 => format!("{}-{}", &plain[..71], &blake3::hash(name.as_bytes()).to_hex()[..8]),
        plain => plain.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_strangers_stay_in_their_folder() {
        for (name, expected) in [
            ("gpt-4.1-mini", "gpt-4.1-mini"),
            ("org/name", "org-name"),
            ("../../x", "x"),
            ("", "other"),
            ("é", "other"),
        ] {
            assert_eq!(slug(name), expected);
        }
        let long = ["a", "b"].map(|end| slug(&("long-".repeat(40) + end)));
        assert!(long.iter().all(|name| name.len() == 80) && long[0] != long[1], "{long:?}");
    }

    #[test]
    fn different_comparisons_have_different_folders() {
        let place = tempfile::tempdir().expect("a folder");
        for name in ["a", "b"] {
            std::fs::create_dir(place.path().join(name)).expect("made");
            std::fs::write(place.path().join(name).join("out.json"), "[]").expect("written");
        }
        let file = |name: &str| against(place.path().join(name).join("out.json").to_str().expect("a name"));
        assert_eq!((file("a"), file("b")), ("a-out".into(), "b-out".into()));
        for (name, expected) in [
            ("base", "base"),
            ("runs/other", "other"),
            ("x/adapter", "x"),
            ("y/adapter/", "y"),
            ("runs/other/checkpoints/step-5", "other-step-5"),
        ] {
            assert_eq!(against(name), expected);
        }
        let several = ["runs/a", "b/adapter"].map(PathBuf::from);
        assert_eq!(sum(&several, &[]), "a-b");
        assert_eq!(sum(&several, &[0.7, 0.3]), "a-0.7-b-0.3");
    }
}
