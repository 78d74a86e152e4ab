//! The binary: arguments in, exit code out.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use dpo_lora::cli::{Cli, Command};
use dpo_lora::commands::{self, Failure};

fn main() -> ExitCode {
    dpo_lora::allocator::keep_freed_memory();
    // a usage error ends the process with 2, as every other wrong request does
    let cli = Cli::parse();
    // inside the pool: every product is then begun by one of the threads that compute it, and none has to be woken first
    let outcome = rayon::scope(|_| match &cli.command {
        Command::Run(run) => commands::run::run(run),
        Command::Plan(plan) => commands::plan::plan(plan),
        Command::Export(export) => commands::export::export(export),
        Command::Merge(merge) => commands::merge::merge(merge),
        Command::Compare(compare) => commands::compare::compare(compare),
        Command::Eval(eval) => commands::eval::eval(eval),
        Command::Generate(generate) => commands::generate::generate(generate),
        Command::Chat(chat) => commands::chat::chat(chat),
        Command::WinRate(win_rate) => commands::win_rate::win_rate(win_rate),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match &failure {
                Failure::Failed(report) | Failure::Request(report) => _ = writeln!(io::stderr(), "{report:?}"),
                Failure::Gate | Failure::Unfinished | Failure::Interrupted(_) => {}
            }
            failure.exit_code()
        }
    }
}
