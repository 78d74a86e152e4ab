//! `dpo-lora compare`: what a merged model has kept of base and adapter.

use super::accounts::{Accounts, Written, check_pairs};
use super::trained::Trained;
use super::{Failure, print_json, request};
use crate::cli;
use crate::export::Merge;
use crate::progress::Console;

/// Compares a merged model with base and adapter.
///
/// # Errors
/// See [`Failure`].
pub fn compare(arguments: &cli::Compare) -> Result<(), Failure> {
    let console = Console::new(arguments.quiet);
    let named = cli::Trained {
        adapters: vec![arguments.adapter.clone()],
        weights: Vec::new(),
        base: arguments.base.clone(),
        quant: arguments.quant,
    };
    let trained = Trained::open(&named, &console)?;
    let data = trained.held_out(arguments.held_out.data.as_deref(), &console)?;
    check_pairs(&arguments.held_out, data.as_ref())?;
    let written = Written::open(&arguments.merged, None)?;
    trained.base.fetch_weights(&console).map_err(super::prepare::from_base)?;
    let merge = Merge::new(&trained.base, &trained.decoder, &trained.adapters).map_err(request)?;
    let accounts = Accounts::take(&trained, &merge, &written, data.as_ref(), &arguments.held_out, &console)?;
    accounts.tell(&console);
    if arguments.json {
        print_json(&accounts.json())?;
    }
    accounts.check(arguments.held_out.fail_if_kl, &console)
}
