//! Reads a model's files as a run would, one of them replaced by given bytes. The tests and the fuzz targets share it.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::DType;
use dpo_lora::data::Codec;
use dpo_lora::gguf::GgufFile;
use dpo_lora::model::{WeightFiles, family, gguf_decoder};
use dpo_lora::progress::Console;
use miette::Diagnostic;
use tempfile::TempDir;

pub(crate) fn fixtures() -> PathBuf {
    // of the fuzz targets the manifest is one folder below
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if manifest.ends_with("fuzz") { manifest.join("..") } else { manifest.to_owned() };
    root.join("tests/fixtures")
}

/// The good files of a model: weights, configuration, tokenizer; or all of them in one.
pub(crate) fn good(name: &str) -> Vec<u8> {
    let path = match name {
        "model.gguf" => fixtures().join("quant/gqa.gguf"),
        "tokenizer.json" => fixtures().join("data/model/tokenizer.json"),
        name => fixtures().join("golden/gqa").join(name),
    };
    fs::read(path).expect("the fixture is there")
}

/// A folder whose file `name` is `bytes` and whose others are good.
fn folder(name: &str, bytes: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for other in ["model.safetensors", "config.json", "tokenizer.json"] {
        fs::write(folder.path().join(other), good(other)).expect("written");
    }
    fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).expect("written");
    fs::write(folder.path().join(name), bytes).expect("written");
    folder
}

/// Reads all that a run would read of a model, and gives the error.
pub(crate) fn read(name: &str, bytes: &[u8]) -> Result<(), String> {
    let folder = folder(name, bytes);
    let path = folder.path().join(name);
    let silent = Console::silent();
    fn told(error: impl Diagnostic) -> String {
        format!("{error} {}", error.help().map_or_else(String::new, |help| help.to_string()))
    }
    match name {
        "model.gguf" => {
            let file = GgufFile::open(&path).map_err(told)?;
            let config = family::read_gguf(&file).map_err(told)?;
            gguf_decoder(&file, config, DType::F32).map_err(told)?;
            Codec::open(&path, None).map_err(told)?;
        }
        "tokenizer.json" => drop(Codec::open(folder.path(), None).map_err(told)?),
        _ => {
            let config = family::read_config(folder.path()).map_err(told)?;
            let files = WeightFiles::open(folder.path()).map_err(told)?;
            files.decoder(config, DType::F32, &silent).map_err(told)?;
        }
    }
    Ok(())
}
