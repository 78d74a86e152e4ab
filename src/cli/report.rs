//! `dpo-lora report`

use std::path::PathBuf;

use clap::Args;

pub(super) const HELP: &str = "\
Of one run, report.html in its folder is written again, with what has come since: win rates, an evaluation. Of several, they
are shown beside each other. The page is one file that loads nothing; it opens in any browser and can be sent to anybody.

Examples:
  dpo-lora report runs/my
  dpo-lora report runs/beta-0.1 runs/beta-0.5 --out compared.html

Exit codes: 0 done, 1 it could not be written, 2 the request was wrong.";

/// `dpo-lora report`
#[derive(Debug, Args)]
pub struct Report {
    /// A run folder; several are compared.
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The file [default: RUN/report.html; compared.html for several].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Only errors.
    #[arg(short, long)]
    pub quiet: bool,
}
