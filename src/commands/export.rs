//! `dpo-lora export`: an adapter for other programs.

use super::merge::{check_free, is_gguf, make_parent, modelfile_of};
use super::trained::{Trained, candle, described};
use super::{Failure, failed, request};
use crate::adapter::{Lora, peft};
use crate::cli;
use crate::export::check::{self, Finding, Form};
use crate::export::{LoraGguf, card};
use crate::files;
use crate::progress::Console;

/// Writes an adapter, after the rules of those who are to read it were applied.
///
/// # Errors
/// See [`Failure`]; [`Failure::Gate`] where one of them would not take it.
pub fn export(arguments: &cli::Export) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    if let Some(out) = &arguments.out {
        check_free(out, arguments.force)?;
    }
    let trained = Trained::open(&arguments.trained, &console)?;
    let mut adapters = trained.adapters.clone();
    if let Some(rank) = arguments.rank {
        let (cut, lost) = adapters.truncated(rank as usize).map_err(request)?;
        adapters = cut;
        console.fact(
            "cut",
            format_args!(
                "{}; {:.2} % of the update is lost, at most {:.2} % of one module's ({})",
                described(&adapters),
                100.0 * lost.total,
                100.0 * lost.worst.1,
                lost.worst.0
            ),
        );
    }
    if arguments.scale_into_b {
        adapters = adapters.scaled_into_b().map_err(candle)?;
        console.fact("scale", format_args!("in B: {}, scale 1", described(&adapters)));
    }

    let form = if arguments.out.as_deref().is_some_and(is_gguf) { Form::Gguf } else { Form::Peft };
    let mut refused = false;
    for &consumer in &arguments.check {
        for finding in check::check(consumer, &adapters, form, &trained.base_name()) {
            match finding {
                Finding::Refused { problem, help } => {
                    refused = true;
                    console.fact(consumer.name(), format_args!("refused: {problem}\n{help}"));
                }
                Finding::Note(note) => console.fact(consumer.name(), format_args!("takes it: {note}")),
            }
        }
    }
    if refused {
        return Err(Failure::Gate);
    }
    let Some(out) = &arguments.out else { return Ok(()) };

    let numbers: usize = adapters.iter().map(|lora: &Lora| lora.a().elem_count() + lora.b().elem_count()).sum();
    files::check_space(out, 4 * numbers).map_err(request)?;
    make_parent(out)?;
    match form {
        Form::Peft => {
            let (base, codec) = (trained.base_name(), trained.codec()?);
            files::write_folder(out, |folder| {
                peft::save(&adapters, &base, folder)?;
                codec.save(folder)?;
                trained.write_tokenizer(folder)?;
                files::write(&folder.join("README.md"), trained.card(card::Kind::Adapter, &adapters).as_bytes())?;
                Ok::<_, peft::SaveError>(())
            })
            .map_err(failed)?;
        }
        Form::Gguf => {
            let name = out.file_stem().unwrap_or_default().to_string_lossy();
            let file = LoraGguf::plan(&adapters, &trained.decoder, &name).map_err(request)?;
            file.write(out).map_err(failed)?;
        }
    }
    if arguments.modelfile {
        let adapter = std::path::absolute(out).unwrap_or_else(|_| out.clone());
        trained.write_modelfile(&modelfile_of(out), trained.base.path(), Some(&adapter))?;
    }
    console.line(format_args!("the adapter is in {}", out.display()));
    Ok(())
}
