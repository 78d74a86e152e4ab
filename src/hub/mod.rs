//! The Hugging Face hub: models and data sets that a recipe names there, fetched into the cache that Python's
//! `huggingface_hub` keeps, so that what one of them fetched the other finds.
//!
//! `http` asks, `cache` keeps, `dataset` reads `hf://` addresses. `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`,
//! `HF_TOKEN_PATH`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean in Python.

mod cache;
mod dataset;
mod http;

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use serde_json::Value;
use thiserror::Error;

pub use cache::Snapshot;
pub use dataset::{Address, SCHEME, is_address};
pub use http::Token;

use self::http::Client;
use crate::progress::Console;
use crate::tensor_file::describe_io;

/// The branch that is read where none is named.
pub const MAIN: &str = "main";

/// What went wrong with the hub.
#[derive(Debug, Error, Diagnostic)]
#[error("{what}: {problem}")]
pub struct HubError {
    /// The repository, file or address.
    pub what: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    #[help]
    pub help: Option<String>,
    /// Of what kind it is.
    pub cause: Cause,
}

/// Kinds of trouble with the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// There is nothing of that name, or it may not be read: the request was wrong.
    Request,
    /// There is no way to the hub.
    Connection,
    /// The hub, the disk or the transfer failed.
    Failure,
}

impl HubError {
    fn new(cause: Cause, what: impl fmt::Display, problem: impl Into<String>, help: impl Into<String>) -> Self {
        Self { what: what.to_string(), problem: problem.into(), help: Some(help.into()), cause }
    }

    fn request(what: impl fmt::Display, problem: impl Into<String>, help: impl Into<String>) -> Self {
        Self::new(Cause::Request, what, problem, help)
    }

    /// A file of the cache that cannot be read or written.
    fn disk(path: &Path, error: &std::io::Error) -> Self {
        let help = "HF_HUB_CACHE or HF_HOME names another folder to keep what is fetched; what is there of a file is \
                    kept, and fetched on";
        Self::new(Cause::Failure, path.display(), describe_io(error), help)
    }
}

/// Where the hub is, where its files are kept, and who asks.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// The folder with `models--ORG--NAME` and the like.
    pub cache: PathBuf,
    /// Who asks; without it, what is public.
    pub token: Option<Token>,
    /// Nothing is fetched.
    pub offline: bool,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// A variable has a value that is none, or nothing names a folder for the cache.
    pub fn from_env() -> Result<Self, HubError> {
        let set = |name: &str| env::var(name).ok().map(|value| value.trim().to_owned()).filter(|v| !v.is_empty());
        let folder = |name: &str| set(name).map(|path| expanded(&path));
        let home = || {
            let cache = folder("XDG_CACHE_HOME").or_else(|| env::home_dir().map(|home| home.join(".cache")));
            cache.map(|cache| cache.join("huggingface"))
        };
        let Some(home) = folder("HF_HOME").or_else(home) else {
            return Err(HubError::request(
                "HF_HOME",
                "is not set, and there is no home folder",
                "set it to a folder",
            ));
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let is_address = endpoint.starts_with("https://") || endpoint.starts_with("http://");
        if !is_address || endpoint.contains('@') {
            // it is not repeated here: a name in it may come with a password
            let help = "set it to an address without a name in it, such as https://huggingface.co, or unset it";
            return Err(HubError::request("HF_ENDPOINT", "is not the address of a hub", help));
        }
        let file = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = set("HF_TOKEN").map(|token| ("HF_TOKEN".to_owned(), token));
        let stored = || std::fs::read_to_string(&file).ok().map(|token| (file.display().to_string(), token));
        let token = token.or_else(stored).filter(|(_, token)| !token.trim().is_empty());
        let token = token.map(|(from, token)| Token::new(&token).ok_or(from)).transpose().map_err(|from| {
            let help = "a token is one word that begins with hf_";
            HubError::request(from, "holds characters that no token has", help)
        })?;
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: folder("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token,
            offline: set("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())),
        })
    }
}

/// `~/x` in the home folder.
fn expanded(path: &str) -> PathBuf {
    let below_home = Path::new(path).strip_prefix("~").ok().and_then(|rest| Some(env::home_dir()?.join(rest)));
    below_home.unwrap_or_else(|| path.into())
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    kind: Kind,
    id: String,
    revision: String,
}

impl Repo {
    /// The repository `id` (`ORG/NAME`) at a branch, tag or commit.
    ///
    /// # Errors
    /// No repository or revision is called so.
    pub fn new(kind: Kind, id: &str, revision: &str) -> Result<Self, HubError> {
        if !is_id(id) {
            let help = "a repository of the hub is ORG/NAME: letters, digits, `-`, `_` and `.`";
            return Err(HubError::request(id, "is not the name of a repository", help));
        }
        // it becomes a path in the cache and a part of an address
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
        };
        if !revision.split('/').all(plain) {
            let help = "a revision is a branch, a tag or a commit, such as `main`";
            return Err(HubError::request(id, format!("`{revision}` is not the name of a revision"), help));
        }
        Ok(Self { kind, id: id.to_owned(), revision: revision.to_owned() })
    }

    /// As a person writes it.
    fn shown(&self) -> String {
        let revision = if self.revision == MAIN { String::new() } else { format!("@{}", self.revision) };
        match self.kind {
            Kind::Model => format!("{}{revision}", self.id),
            Kind::Dataset => format!("{SCHEME}datasets/{}{revision}", self.id),
        }
    }

    /// The part of an address on the hub that names it.
    fn path(&self) -> String {
        match self.kind {
            Kind::Model => self.id.clone(),
            Kind::Dataset => format!("datasets/{}", self.id),
        }
    }

    /// Its folder in the cache.
    fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }
}

/// Whether a text has the form `ORG/NAME`. What ends as a file does is none.
#[must_use]
pub fn is_id(text: &str) -> bool {
    let part = |part: &str| {
        let ends = ['-', '.'];
        !part.is_empty()
            && part.len() <= 96
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !(part.starts_with(ends) || part.ends_with(ends))
            && !(part.contains("--") || part.contains(".."))
    };
    text.split_once('/').is_some_and(|(org, name)| part(org) && part(name)) && !text.ends_with(".gguf")
}

/// The hub as one process sees it.
#[derive(Debug, Clone)]
pub struct Hub {
    client: Client,
    cache: PathBuf,
    offline: bool,
}

impl Hub {
    /// The hub that the environment names.
    ///
    /// # Errors
    /// See [`Settings::from_env`].
    pub fn from_env() -> Result<Self, HubError> {
        Settings::from_env().map(Self::new)
    }

    /// A hub with these settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings { endpoint, cache, token, offline } = settings;
        Self { client: Client::new(endpoint, token), cache, offline }
    }

    /// What a repository holds at its revision. Where the hub is not to be reached or out of order, what the cache has of
    /// it.
    ///
    /// # Errors
    /// There is no such repository or revision, it may not be read, or neither hub nor cache can tell.
    pub fn snapshot(&self, repo: Repo, console: &Console) -> Result<Snapshot, HubError> {
        let place = self.cache.join(repo.folder());
        if self.offline {
            let help = format!(
                "HF_HUB_OFFLINE is set: unset it, or fetch the repository where there is a network with \
                 `hf download {}{}`",
                repo.id,
                if repo.kind == Kind::Dataset { " --repo-type dataset" } else { "" }
            );
            let missing =
                || HubError::request(repo.shown(), format!("is not in the cache {}", self.cache.display()), help);
            return Snapshot::kept(self, &repo, place.clone()).ok_or_else(missing);
        }
        match self.ask(&repo, console) {
            Ok((commit, files)) => Snapshot::new(self, repo, place, commit, files),
            Err(error) if error.cause != Cause::Request => {
                let Some(kept) = Snapshot::kept(self, &repo, place) else { return Err(error) };
                console.warning(format_args!("{error}; what the cache has of {} is used", repo.shown()));
                Ok(kept)
            }
            Err(error) => Err(error),
        }
    }

    /// Commit and files of a repository.
    fn ask(&self, repo: &Repo, console: &Console) -> Result<(String, Vec<String>), HubError> {
        let (kind, revision) = (repo.kind.plural(), http::escaped(&repo.revision, false));
        let url = format!("{}/api/{kind}/{}/revision/{revision}", self.client.endpoint(), repo.id);
        let text = self.client.text(&url, repo, console)?;
        let answer: Option<Value> = serde_json::from_str(&text).ok();
        let read = answer.as_ref().and_then(|answer| {
            let commit = answer.get("sha")?.as_str().filter(|commit| cache::is_plain(commit))?;
            let files = answer.get("siblings")?.as_array()?;
            let files = files.iter().filter_map(|file| file.get("rfilename")?.as_str().map(ToOwned::to_owned));
            Some((commit.to_owned(), files.collect()))
        });
        let help = "HF_ENDPOINT names a server that answers as huggingface.co does";
        read.ok_or_else(|| HubError::new(Cause::Failure, url, "does not answer as the hub does", help))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["org/name", "meta-llama/Llama-3.1-8B-Instruct", "a_b/c.d"] {
            assert!(is_id(id), "{id}");
        }
        for path in
            ["name", "./name", "../x", "/a/b", "~/x", "a/b/c", "a/", "/b", "a/b.gguf", "a--b/c", "a/..", "a b/c"]
        {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn a_revision_stays_in_its_folder() {
        for revision in ["main", "v1.0", "refs/pr/3", "refs/convert/parquet"] {
            assert!(Repo::new(Kind::Model, "a/b", revision).is_ok(), "{revision}");
        }
        for revision in ["", "../x", "a/../b", "a//b", "/a", "a b", "a\\b", "C:"] {
            assert!(Repo::new(Kind::Model, "a/b", revision).is_err(), "{revision}");
        }
    }
}
