//! Where a base comes from: a folder, a GGUF file, or a repository of the hub with either.

use std::path::{Path, PathBuf};

use candle_core::DType;

use super::weights::{INDEX, SINGLE, file_names};
use super::{
    BaseFiles, Decoder, DecoderConfig, ModelConfig, ModelError, WeightFiles, check_folder, family, gguf_decoder,
};
use crate::gguf::GgufFile;
use crate::hub::{self, Hub, HubError, Kind, MAIN, Repo, Snapshot};
use crate::progress::Console;
use crate::quant::Quant;
use crate::suggest::{did_you_mean, list};

/// What is read before any weight: configuration and tokenizer.
const CONFIG: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    INDEX,
];

/// What `[model] source` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'c> {
    /// A local folder in Hugging Face layout.
    Folder(&'c Path),
    /// A local GGUF file.
    Gguf(&'c Path),
    /// A repository of the hub.
    Hub {
        /// `ORG/NAME`
        id: &'c str,
        /// A branch, tag or commit.
        revision: &'c str,
        /// A GGUF file in it; otherwise it is laid out as a folder.
        file: Option<&'c str>,
    },
}

impl ModelConfig {
    /// What `source` names. The recipe has made paths absolute, so `ORG/NAME` is left for the hub.
    #[must_use]
    pub fn source(&self) -> Source<'_> {
        let path = self.source.as_path();
        match path.to_str().filter(|text| hub::is_id(text)) {
            Some(id) => {
                let revision = self.revision.as_deref().unwrap_or(MAIN);
                Source::Hub { id, revision, file: self.file.as_deref() }
            }
            None if is_gguf(path) => Source::Gguf(path),
            None => Source::Folder(path),
        }
    }
}

/// A hash of all weights, of `bytes` in all.
fn fingerprint<'f>(chunks: impl Iterator<Item = &'f [u8]>, bytes: usize, console: &Console) -> String {
    let bar = console.bytes_bar("hashing weights", bytes as u64);
    let mut hasher = blake3::Hasher::new();
    for chunk in chunks {
        hasher.update(chunk);
        bar.advance(chunk.len() as u64);
    }
    hasher.finalize().to_string()
}

/// The same files, kept otherwise, are another base.
fn named(hash: String, quant: Quant) -> String {
    if quant == Quant::None { hash } else { format!("{hash}-{}", quant.name()) }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A base whose configuration and tokenizer are on disk.
#[derive(Debug)]
pub struct Base {
    path: PathBuf,
    snapshot: Option<Snapshot>,
}

impl Base {
    /// Finds a base, on the `hub` if that is where it is. Of a repository only what [`Base::fetch_weights`] leaves is
    /// fetched; a GGUF file, which is one with its configuration, whole.
    ///
    /// # Errors
    /// It is not there, or what the hub returns.
    pub fn locate(
        config: &ModelConfig,
        hub: impl FnOnce() -> Result<Hub, HubError>,
        console: &Console,
    ) -> Result<Self, ModelError> {
        let (id, revision, file) = match config.source() {
            Source::Folder(folder) => {
                check_folder(folder)?;
                return Ok(Self { path: folder.to_owned(), snapshot: None });
            }
            Source::Gguf(path) if path.is_file() => return Ok(Self { path: path.to_owned(), snapshot: None }),
            Source::Gguf(path) => {
                let help = "source is a GGUF file, a folder, or a hub id ORG/NAME with file = \"NAME.gguf\"";
                return Err(ModelError::NoFile(path.to_owned(), help.to_owned()));
            }
            Source::Hub { id, revision, file } => (id, revision, file),
        };
        let snapshot = hub()?.snapshot(Repo::new(Kind::Model, id, revision)?, console)?;
        let path = match file {
            Some(file) => {
                has_file(&snapshot, file)?;
                snapshot.fetch(&[file], console)?.join(file)
            }
            None => {
                has_model(&snapshot)?;
                let names: Vec<&str> = CONFIG.into_iter().filter(|name| snapshot.has(name)).collect();
                snapshot.fetch(&names, console)?
            }
        };
        Ok(Self { path, snapshot: Some(snapshot) })
    }

    /// A base on disk.
    ///
    /// # Errors
    /// It is not there.
    pub fn local(path: &Path) -> Result<Self, ModelError> {
        if is_gguf(path) && path.is_file() {
            return Ok(Self { path: path.to_owned(), snapshot: None });
        }
        check_folder(path)?;
        Ok(Self { path: path.to_owned(), snapshot: None })
    }

    /// Whether it is one GGUF file, and no folder.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        is_gguf(&self.path)
    }

    /// The folder, or the GGUF file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The decoder that it is, its matrices kept as `quant` says. No weight is read.
    ///
    /// # Errors
    /// It is none that can be trained on, or is quantized already and otherwise.
    pub fn config(&self, quant: Quant) -> Result<DecoderConfig, ModelError> {
        let config = match is_gguf(&self.path) {
            true => family::read_gguf(&GgufFile::open(&self.path)?)?,
            false => family::read_config(&self.path)?,
        };
        config.kept(quant)
    }

    /// Opens the files with its weights, whose headers are checked; no weight is read.
    ///
    /// # Errors
    /// They are missing or broken.
    pub fn files(&self) -> Result<BaseFiles, ModelError> {
        Ok(match is_gguf(&self.path) {
            true => BaseFiles::Gguf(GgufFile::open(&self.path)?),
            false => BaseFiles::Folder(WeightFiles::open(&self.path)?),
        })
    }

    /// Loads the decoder that `config` describes, to compute in f32, and a hash that names it: the same files, kept
    /// otherwise, are another base.
    ///
    /// # Errors
    /// Weights are missing, broken, or do not fit the configuration.
    pub fn load(&self, config: DecoderConfig, console: &Console) -> Result<(Decoder, String), ModelError> {
        let quant = config.quant;
        let (decoder, hash) = match self.files()? {
            BaseFiles::Gguf(file) => {
                (gguf_decoder(&file, config, DType::F32)?, fingerprint(file.chunks(), file.num_bytes(), console))
            }
            BaseFiles::Folder(files) => {
                let decoder = files.decoder(config, DType::F32, console)?;
                (decoder, fingerprint(files.chunks(), files.num_bytes(), console))
            }
        };
        Ok((decoder, named(hash, quant)))
    }

    /// The hash that [`Base::load`] gives, without loading.
    ///
    /// # Errors
    /// Weights are missing or broken.
    pub fn fingerprint(&self, quant: Quant, console: &Console) -> Result<String, ModelError> {
        let hash = match self.files()? {
            BaseFiles::Gguf(file) => fingerprint(file.chunks(), file.num_bytes(), console),
            BaseFiles::Folder(files) => fingerprint(files.chunks(), files.num_bytes(), console),
        };
        Ok(named(hash, quant))
    }

    /// The commit of the repository, if it is of the hub.
    #[must_use]
    pub fn commit(&self) -> Option<&str> {
        self.snapshot.as_ref().map(Snapshot::commit)
    }

    /// Fetches the weights, if they are on the hub and not on disk.
    ///
    /// # Errors
    /// What the hub returns, or an index that is none.
    pub fn fetch_weights(&self, console: &Console) -> Result<(), ModelError> {
        let Some(snapshot) = self.snapshot.as_ref().filter(|_| !is_gguf(&self.path)) else { return Ok(()) };
        let names = match snapshot.has(INDEX) {
            true => file_names(&self.path)?,
            false => vec![SINGLE.to_owned()],
        };
        snapshot.fetch(&names, console)?;
        Ok(())
    }
}

/// GGUF files of a repository.
fn gguf_files(snapshot: &Snapshot) -> Vec<String> {
    snapshot.files().iter().filter(|name| is_gguf(Path::new(name))).cloned().collect()
}

fn has_file(snapshot: &Snapshot, file: &str) -> Result<(), ModelError> {
    if !is_gguf(Path::new(file)) {
        let help = "`file` names a GGUF file of the repository; without it the repository is read as a folder";
        return Err(snapshot.refuse(format!("`{file}` is no GGUF file"), help.into()).into());
    }
    if snapshot.has(file) {
        return Ok(());
    }
    let there = gguf_files(snapshot);
    let help = match did_you_mean(file, there.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None if there.is_empty() => "it has no GGUF file".to_owned(),
        None => format!("its GGUF files are {}", list(&there)),
    };
    Err(snapshot.refuse(format!("has no file `{file}`"), help).into())
}

/// Checks that a repository has what a folder needs, before anything of it is fetched.
fn has_model(snapshot: &Snapshot) -> Result<(), ModelError> {
    let there = || format!("it has {}", list(snapshot.files()));
    if !snapshot.has("config.json") {
        let gguf = gguf_files(snapshot);
        let help = if !gguf.is_empty() {
            format!("it has GGUF files; [model] file names one of them: {}", list(&gguf))
        } else if snapshot.has("adapter_config.json") {
            "it is an adapter; source is the base that adapters are trained on".to_owned()
        } else {
            there()
        };
        return Err(snapshot.refuse("is no model: it has no config.json".into(), help).into());
    }
    // a plan can be made of what an earlier one left in the cache
    if !(snapshot.is_kept() || snapshot.has(INDEX) || snapshot.has(SINGLE)) {
        let help = format!("weights are read from {SINGLE}, or from the shards of {INDEX}; {}", there());
        return Err(snapshot.refuse("has no weights in safetensors".into(), help).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_sources() {
        let config =
            |source: &str| ModelConfig { source: source.into(), quant: Quant::None, revision: None, file: None };
        assert_eq!(config("/models/a").source(), Source::Folder(Path::new("/models/a")));
        assert_eq!(config("/models/a.GGUF").source(), Source::Gguf(Path::new("/models/a.GGUF")));
        assert_eq!(config("org/a").source(), Source::Hub { id: "org/a", revision: "main", file: None });
        let config = ModelConfig { revision: Some("v2".into()), file: Some("a.gguf".into()), ..config("org/a") };
        assert_eq!(config.source(), Source::Hub { id: "org/a", revision: "v2", file: Some("a.gguf") });
    }
}
