//! `dpo-lora merge`: base and adapter as one model.

use std::path::Path;

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
use crate::export::{ExportError, Float, Merge, MergedFolder};
use crate::files;
use crate::progress::Console;

#[derive(Debug, Error, Diagnostic)]
enum MergeError {
    #[error("--type {0} is no type of a Hugging Face folder")]
    #[diagnostic(help("a folder has f32, f16 or bf16; block types need a file that ends in .gguf as --out"))]
    FolderType(String),
}

/// Merges adapters into their base.
///
/// # Errors
/// See [`Failure`].
pub fn merge(arguments: &cli::Merge) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let out = arguments.out.as_path();
    check_free(out, arguments.force)?;
    let float = folder_type(arguments.element_type.as_deref())?;
    let trained = Trained::open(&arguments.trained, &console)?;
    let data = match arguments.no_accounts {
        true => None,
        false => trained.held_out(arguments.held_out.data.as_deref(), &console)?,
    };
    check_pairs(&arguments.held_out, data.as_ref())?;
    trained.base.fetch_weights(&console).map_err(from_base)?;
    let merge = Merge::new(&trained.base, &trained.decoder, &trained.adapters).map_err(request)?;
    let folder = MergedFolder::plan(&merge, float, arguments.shard_size.get()).map_err(request)?;
    files::check_space(out, folder.num_bytes()).map_err(request)?;
    console.fact(
        "writes",
        format_args!("{}, {} in {}", out.display(), bytes::shown(folder.num_bytes()), folder.float().name()),
    );
    make_parent(out)?;
    files::write_folder(out, |partial| {
        folder.write(partial, &console)?;
        files::write(&partial.join("README.md"), trained.card(card::Kind::Merged, &trained.adapters).as_bytes())?;
        Ok::<_, ExportError>(trained.write_tokenizer(partial)?)
    })
    .map_err(failed)?;
    if arguments.modelfile {
        let from = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
        trained.write_modelfile(&out.join("Modelfile"), &from, None)?;
    }
    let written = folder.float().name().to_owned();
    drop(folder);
    let mut facts = json!({ "out": out, "type": written });
    let accounts = match arguments.no_accounts {
        true => None,
        false => {
            let written = Written::open(out, Some(&written))?;
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

fn folder_type(name: Option<&str>) -> Result<Option<Float>, Failure> {
    let Some(name) = name else { return Ok(None) };
    Float::from_str(name, true).map(Some).map_err(|_| request(MergeError::FolderType(name.to_owned())))
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
