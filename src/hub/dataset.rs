//! Data sets of the hub: `hf://datasets/ORG/NAME[@REVISION][/SPLIT or /FILE or /GLOB]`.
//!
//! A split is what its files are named after, as `datasets` reads them: `data/train-00000-of-00002.parquet`,
//! `train.jsonl`, `main/test-00000-of-00001.parquet`, `default/train/0000.parquet`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use glob::{MatchOptions, Pattern};
use regex::Regex;

use super::{Hub, HubError, Kind, MAIN, Repo};
use crate::progress::Console;
use crate::suggest::{did_you_mean, list};

/// How addresses begin.
pub const SCHEME: &str = "hf://";
/// What they look like.
const FORM: &str = "hf://datasets/ORG/NAME, with @REVISION, /SPLIT, /FILE.parquet or /FOLDER/*.parquet after it";

/// Data files of a hub's data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    repo: Repo,
    /// A split, a file, a pattern, or nothing.
    rest: String,
}

/// Whether a path is an address on the hub.
#[must_use]
pub fn is_address(path: &Path) -> bool {
    path.to_string_lossy().starts_with(SCHEME)
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// It is not of the form above.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let wrong = || HubError::request(text, "is not the address of a data set", FORM);
        let path = text.strip_prefix(SCHEME).and_then(|path| path.strip_prefix("datasets/")).ok_or_else(wrong)?;
        let mut parts = path.trim_end_matches('/').split('/').peekable();
        let (org, name) = parts.next().zip(parts.next()).ok_or_else(wrong)?;
        let (name, revision) = match name.split_once('@') {
            None => (name, MAIN.to_owned()),
            // the branches refs/convert/parquet and refs/pr/1 have slashes in their names
            Some((name, "refs")) => {
                (name, ["refs"].into_iter().chain(parts.by_ref().take(2)).collect::<Vec<_>>().join("/"))
            }
            Some((name, revision)) => (name, revision.replace("%2F", "/")),
        };
        let repo = Repo::new(Kind::Dataset, &format!("{org}/{name}"), &revision)?;
        Ok(Self { repo, rest: parts.collect::<Vec<_>>().join("/") })
    }

    /// Fetches its files: where each is on disk, and its own address.
    ///
    /// # Errors
    /// No split or file is called so, or what [`Snapshot::fetch`](super::Snapshot::fetch) returns.
    pub fn fetch(&self, hub: &Hub, console: &Console) -> Result<Vec<(PathBuf, PathBuf)>, HubError> {
        let snapshot = hub.snapshot(self.repo.clone(), console)?;
        let selected = select(snapshot.files(), &self.rest)
            .map_err(|(problem, help)| snapshot.refuse(problem, help.replace("HERE", &snapshot.shown())))?;
        let is_open = is_pattern(&self.rest) || (selected.len() > 1 && shards(&selected[0]).is_none());
        if snapshot.is_kept() && is_open {
            console.warning(format_args!(
                "{}: the cache has {} of the files that are meant, and nothing tells whether the hub has more",
                snapshot.shown(),
                selected.len()
            ));
        }
        let folder = snapshot.fetch(&selected, console)?;
        let place = |name: &String| (folder.join(name), PathBuf::from(format!("{}/{name}", snapshot.shown())));
        Ok(selected.iter().map(place).collect())
    }
}

/// The files that `rest` names, or the problem and what to do.
fn select(files: &[String], rest: &str) -> Result<Vec<String>, (String, String)> {
    let data: Vec<&String> = files.iter().filter(|file| is_data(file)).collect();
    if data.is_empty() {
        let there = if files.is_empty() { "nothing".to_owned() } else { listed(files.iter().map(String::as_str)) };
        let help = format!(
            "there is {there}; what is read is .parquet, .jsonl, .ndjson and .json, and the hub keeps many a data set \
             as Parquet in a branch of its own: HERE@refs/convert/parquet"
        );
        return Err(("has no file that is read".into(), help));
    }
    if is_data(rest) || is_pattern(rest) {
        let wrong = |e| (format!("`{rest}` is no valid pattern: {e}"), FORM.to_owned());
        let pattern = Pattern::new(rest).map_err(wrong)?;
        let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
        let is_meant = |file: &&String| *file == rest || pattern.matches_with(file, options);
        let mut found: Vec<String> = data.iter().copied().filter(is_meant).cloned().collect();
        found.sort_unstable();
        if found.is_empty() {
            let near = did_you_mean(rest, data.iter().map(|file| file.as_str()));
            let there = || format!("there are {}", listed(data.iter().map(|file| file.as_str())));
            let help = near.map_or_else(there, |near| format!("did you mean `HERE/{near}`?"));
            return Err((format!("has no file `{rest}`"), help));
        }
        return Ok(found);
    }

    let mut splits = BTreeMap::<String, Vec<String>>::new();
    for file in data {
        splits.entry(split(file)).or_default().push(file.clone());
    }
    let names = || listed(splits.keys().map(String::as_str));
    let wanted = if rest.is_empty() { "train" } else { rest };
    let is_meant = |split: &&String| *split == wanted || split.rsplit('/').next() == Some(wanted);
    let meant: Vec<&String> = match splits.keys().find(|split| *split == wanted) {
        Some(exact) => vec![exact],
        None if rest.is_empty() && splits.len() == 1 => splits.keys().collect(),
        None => splits.keys().filter(is_meant).collect(),
    };
    let [name] = meant.as_slice() else {
        return Err(match (rest, meant.len()) {
            ("", _) => (format!("has the splits {}", names()), "name one: HERE/SPLIT".into()),
            (_, 0) => {
                let near = did_you_mean(rest, splits.keys().map(String::as_str));
                let help =
                    near.map_or_else(|| "name one of them".into(), |near| format!("did you mean `HERE/{near}`?"));
                (format!("has no split `{rest}`, but {}", names()), help)
            }
            (_, count) => {
                let meant = listed(meant.iter().map(|split| split.as_str()));
                (
                    format!("has {count} splits `{rest}`: {meant}"),
                    "name one with its folder: HERE/FOLDER/SPLIT".into(),
                )
            }
        });
    };
    let mut found = splits[*name].clone();
    found.sort_unstable();
    let all = listed(found.iter().map(String::as_str));
    let extension = |file: &String| Path::new(file).extension().map(ToOwned::to_owned);
    if found.iter().any(|file| extension(file) != extension(&found[0])) {
        let help = "the same rows may be in more than one of them: name a file or a pattern, HERE/FILE";
        return Err((format!("has split `{name}` in several formats: {all}"), help.into()));
    }
    // a cache may hold some of the shards only
    if let Some(count) = found.first().and_then(|file| shards(file))
        && count != found.len()
    {
        let help = "fetch it again with a network and without HF_HUB_OFFLINE, or name the files";
        return Err((format!("has {} of the {count} files of split `{name}`: {all}", found.len()), help.into()));
    }
    Ok(found)
}

fn is_pattern(rest: &str) -> bool {
    rest.contains(['*', '?', '['])
}

/// Whether a file holds rows, by its name.
fn is_data(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    let extensions = [".parquet", ".jsonl", ".ndjson", ".json"];
    let hidden = file.split('/').any(|part| part.starts_with(['.', '_']));
    !hidden
        && extensions.iter().any(|extension| name.ends_with(extension) && name != *extension)
        && !["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"].contains(&name)
}

/// Number and count of a shard at the end of a name.
static SHARD: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"[-_.](?:part[-_.]?)?\d+(?:[-_]of[-_](?<count>\d+))?(?:[-_.][0-9a-f]{16})?$").expect("it is valid")
});

/// The split that a file belongs to, with its folder where that says more than `data`.
fn split(file: &str) -> String {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let split = SHARD.replace(stem, "");
    // numbered files are of the split that their folder is named after
    let numbered = stem.chars().all(|c| c.is_ascii_digit());
    match folder {
        "" | "data" if !numbered => split.into_owned(),
        "" => stem.to_owned(),
        _ if numbered => folder.strip_prefix("data/").unwrap_or(folder).to_owned(),
        _ => format!("{}/{split}", folder.strip_prefix("data/").unwrap_or(folder)),
    }
}

/// How many shards a file says that there are.
fn shards(file: &str) -> Option<usize> {
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    SHARD.captures(stem)?.name("count")?.as_str().parse().ok()
}

fn listed<'n>(names: impl Iterator<Item = &'n str>) -> String {
    let names: Vec<String> = names.map(ToOwned::to_owned).collect();
    list(&names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], rest: &str) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        select(&files, rest).map_err(|(problem, help)| format!("{problem} | {help}"))
    }

    const ULTRAFEEDBACK: [&str; 6] = [
        "README.md",
        ".gitattributes",
        "data/test_prefs-00000-of-00001.parquet",
        "data/train_prefs-00000-of-00001.parquet",
        "data/train_sft-00000-of-00002-0123456789abcdef.parquet",
        "data/train_sft-00001-of-00002-0123456789abcdef.parquet",
    ];

    #[test]
    fn a_split_is_its_files() {
        assert_eq!(chosen(&ULTRAFEEDBACK, "train_prefs").expect("there"), [ULTRAFEEDBACK[3]]);
        assert_eq!(chosen(&ULTRAFEEDBACK, "train_sft").expect("there"), ULTRAFEEDBACK[4..]);
        let text = chosen(&ULTRAFEEDBACK, "train_pref").expect_err("none");
        assert!(
            text.contains("`test_prefs`, `train_prefs`, `train_sft`") && text.contains("HERE/train_prefs"),
            "{text}"
        );
        let text = chosen(&ULTRAFEEDBACK, "").expect_err("several");
        assert!(text.contains("`test_prefs`, `train_prefs`, `train_sft`"), "{text}");
        let text = chosen(&ULTRAFEEDBACK[..5], "train_sft").expect_err("cut short");
        assert!(text.contains("has 1 of the 2 files"), "{text}");
    }

    #[test]
    fn layouts_of_data_sets() {
        let expect = |files: &[&str], rest: &str, expected: &[&str]| {
            assert_eq!(
                chosen(files, rest).as_deref(),
                Ok(&expected.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>()[..])
            );
        };
        expect(&["train.jsonl", "test.jsonl", "dataset_infos.json"], "", &["train.jsonl"]);
        expect(&["pairs.json", "README.md"], "", &["pairs.json"]);
        expect(
            &["default/train/0000.parquet", "default/train/0001.parquet"],
            "train",
            &["default/train/0000.parquet", "default/train/0001.parquet"],
        );
        expect(&["data/train_1.jsonl", "data/train_2.jsonl"], "train", &["data/train_1.jsonl", "data/train_2.jsonl"]);
        let two = ["main/train-00000-of-00001.parquet", "other/train-00000-of-00001.parquet"];
        expect(&two, "main/train", &two[..1]);
        assert!(chosen(&two, "train").expect_err("two").contains("`main/train`, `other/train`"));
        assert!(chosen(&["train.parquet", "train.jsonl"], "train").expect_err("two").contains("several formats"));
        assert!(chosen(&["a.csv"], "").expect_err("none").contains("refs/convert/parquet"));
    }

    #[test]
    fn files_and_patterns() {
        assert_eq!(chosen(&ULTRAFEEDBACK, "data/train_sft-*.parquet").expect("there"), ULTRAFEEDBACK[4..]);
        assert_eq!(chosen(&ULTRAFEEDBACK, "**/*_prefs-*").expect("there"), ULTRAFEEDBACK[2..4]);
        assert!(chosen(&ULTRAFEEDBACK, "*.parquet").is_err());
        let text = chosen(&ULTRAFEEDBACK, "data/test_pref-00000-of-00001.parquet").expect_err("none");
        assert!(text.contains("did you mean `HERE/data/test_prefs-"), "{text}");
    }

    #[test]
    fn addresses() {
        let read = |text: &str| {
            Address::parse(text).map(|a| (a.repo.id, a.repo.revision, a.rest)).map_err(|e| e.to_string())
        };
        let expect = |id: &str, revision: &str, rest: &str| Ok((id.to_owned(), revision.to_owned(), rest.to_owned()));
        assert_eq!(read("hf://datasets/a/b"), expect("a/b", "main", ""));
        assert_eq!(read("hf://datasets/a/b/main/train/"), expect("a/b", "main", "main/train"));
        assert_eq!(read("hf://datasets/a/b@v1/x/*.parquet"), expect("a/b", "v1", "x/*.parquet"));
        assert_eq!(
            read("hf://datasets/a/b@refs/convert/parquet/train"),
            expect("a/b", "refs/convert/parquet", "train")
        );
        for wrong in ["hf://a/b", "hf://datasets/b", "hf://datasets/../b", "hf://datasets/a/b@../x"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
