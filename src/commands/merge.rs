//! `dpo-lora merge`: base and adapter as one model.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use miette::Diagnostic;
use serde_json::json;
use thiserror::Error;

use super::accounts::{Accounts, Written, check_pairs};
use super::prepare::from_base;
use super::trained::Trained;
use super::{Failure, failed, print_json, request};
use crate::bytes;
use crate::cli;
use crate::export::card;
use crate::export::{ExportError, Float, Merge, MergedFolder, MergedGguf};
use crate::files;
use crate::progress::Console;
use crate::quant::Quant;

#[derive(Debug, Error, Diagnostic)]
enum MergeError {
    #[error("--type {0} is no type of a Hugging Face folder")]
    #[diagnostic(help("a folder has f32, f16 or bf16; block types need a file that ends in .gguf as --out"))]
    FolderType(String),
    #[error("--type {0} is no type of a GGUF file")]
    #[diagnostic(help("it is one of f32, {}", GGUF_TYPES.join(", ")))]
    GgufType(String),
}

/// Types of a GGUF file, besides f32.
const GGUF_TYPES: [&str; 12] =
    ["f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k"];

/// Element types of what is written.
enum Type {
    /// Of a folder, where it is not the base's.
    Folder(Option<Float>),
    Gguf(Quant),
}

impl Type {
    fn of(out: &Path, name: Option<&str>) -> Result<Self, Failure> {
        match (is_gguf(out), name) {
            (false, None) => Ok(Self::Folder(None)),
            (false, Some(name)) => {
                let float = Float::from_str(name, true);
                float.map(|float| Self::Folder(Some(float))).map_err(|_| request(MergeError::FolderType(name.into())))
            }
            (true, None) => Ok(Self::Gguf(Quant::F16)),
            (true, Some(name)) => {
                let name = name.to_ascii_lowercase();
                match Quant::by_name(&name) {
                    _ if name == "f32" => Ok(Self::Gguf(Quant::None)),
                    Ok(quant) if GGUF_TYPES.contains(&quant.name()) => Ok(Self::Gguf(quant)),
                    _ => Err(request(MergeError::GgufType(name))),
                }
            }
        }
    }
}

/// Merges adapters into their base.
///
/// # Errors
/// See [`Failure`].
pub fn merge(arguments: &cli::Merge) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let out = arguments.out.as_path();
    check_free(out, arguments.force)?;
    let element_type = Type::of(out, arguments.element_type.as_deref())?;
    let trained = Trained::open(&arguments.trained, &console)?;
    let data = match arguments.no_accounts {
        true => None,
        false => trained.held_out(arguments.held_out.data.as_deref(), &console)?,
    };
    check_pairs(&arguments.held_out, data.as_ref())?;
    trained.base.fetch_weights(&console).map_err(from_base)?;
    let merge = Merge::new(&trained.base, &trained.decoder, &trained.adapters).map_err(request)?;
    let planned = |bytes: usize, name: &str| {
        files::check_space(out, bytes).map_err(request)?;
        console.fact("writes", format_args!("{}, {} in {name}", out.display(), bytes::shown(bytes)));
        make_parent(out)
    };
    let written = match element_type {
        Type::Folder(float) => {
            let folder = MergedFolder::plan(&merge, float, arguments.shard_size.get()).map_err(request)?;
            planned(folder.num_bytes(), folder.float().name())?;
            files::write_folder(out, |partial| {
                folder.write(partial, &console)?;
                let card = trained.card(card::Kind::Merged, &trained.adapters);
                files::write(&partial.join("README.md"), card.as_bytes())?;
                Ok::<_, ExportError>(trained.write_tokenizer(partial)?)
            })
            .map_err(failed)?;
            folder.float().name()
        }
        Type::Gguf(quant) => {
            let codec = trained.codec()?;
            let name = out.file_stem().unwrap_or_default().to_string_lossy();
            let file = MergedGguf::plan(&merge, &codec, &name, quant).map_err(request)?;
            let shown = if quant == Quant::None { "f32" } else { quant.name() };
            planned(file.num_bytes().map_err(request)?, shown)?;
            file.write(out, &console).map_err(failed)?;
            shown
        }
    };
    if arguments.modelfile {
        let from = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
        trained.write_modelfile(&modelfile_of(out), &from, None)?;
    }
    let mut facts = json!({ "out": out, "type": written });
    let accounts = match arguments.no_accounts {
        true => None,
        false => {
            let written = Written::open(out, Some(written))?;
            let accounts = Accounts::take(&trained, &merge, &written, data.as_ref(), &arguments.held_out, &console)?;
            accounts.tell(&console);
            facts["accounts"] = accounts.json();
            Some(accounts)
        }
    };
    console.line(format_args!("\nthe merged model is in {}", out.display()));
    if arguments.json {
        print_json(&facts)?;
    }
    accounts.map_or(Ok(()), |accounts| accounts.check(arguments.held_out.fail_if_kl, &console))
}

/// Whether a GGUF file is asked for.
pub(super) fn is_gguf(out: &Path) -> bool {
    out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

/// Where the Modelfile of what is written goes: into a folder, beside a file.
pub(super) fn modelfile_of(out: &Path) -> PathBuf {
    if is_gguf(out) { out.with_extension("Modelfile") } else { out.join("Modelfile") }
}

/// Refuses to write over something that nobody asked to replace.
pub(super) fn check_free(out: &Path, force: bool) -> Result<(), Failure> {
    #[derive(Debug, Error, Diagnostic)]
    #[error("{} is there", .0.display())]
    #[diagnostic(help("name another place with --out, or replace it with --force"))]
    struct There(std::path::PathBuf);
    let free = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => !out.exists(),
    };
    if free || force { Ok(()) } else { Err(request(There(out.to_owned()))) }
}

/// Makes the folders that a name is in.
pub(super) fn make_parent(path: &Path) -> Result<(), Failure> {
    let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) else { return Ok(()) };
    std::fs::create_dir_all(parent).map_err(files::cannot_write(parent)).map_err(ExportError::from).map_err(failed)
}
