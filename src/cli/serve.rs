//! `dpo-lora serve`

use std::net::IpAddr;

use clap::Args;

use super::Trained;
use crate::bytes::Bytes;

/// What comes after the help of `dpo-lora serve`.
pub(super) const HELP: &str = "\
Base and policy are two models of one server, on one copy of the weights: /v1/models, /v1/completions, /v1/chat/completions,
and for lm-evaluation-harness /tokenizer_info, /tokenize and /detokenize. The address is written to stdout when the server
is ready. Ctrl-C or SIGTERM stops it: what is being answered has --grace seconds to end; a second signal stops at once.

Examples:
  dpo-lora serve runs/my
  dpo-lora serve runs/my --port 0 --name my-policy --base-name my-base
  KEY=... dpo-lora serve runs/my --host 0.0.0.0 --key-env KEY
  lm_eval --model local-completions --tasks arc_easy \\
    --model_args model=my,base_url=http://127.0.0.1:8080/v1/completions,batch_size=16

Exit codes: 0 stopped as asked, 1 it failed, 2 the request was wrong, 130/143 stopped by a second signal.";

/// `dpo-lora serve`
#[derive(Debug, Args)]
pub struct Serve {
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub trained: Trained,
    #[expect(missing_docs, reason = "it becomes part of the help")]
    #[command(flatten)]
    pub device: super::Device,
    /// The address to listen at. One that others can reach needs --key-env, or --no-key.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub host: IpAddr,
    /// The port to listen at; 0 takes any that is free.
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    pub port: u16,
    /// The environment variable that holds the key that clients have to send.
    #[arg(long, value_name = "NAME", conflicts_with = "no_key")]
    pub key_env: Option<String>,
    /// Let anybody who can reach the address ask.
    #[arg(long)]
    pub no_key: bool,
    /// What clients call the policy [default: the run's name].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// What clients call the base [default: its name].
    #[arg(long, value_name = "NAME")]
    pub base_name: Option<String>,
    /// The most tokens of prompt and answer together [default: the model's, or what memory has room for].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: Option<u32>,
    /// Answers that are generated at once, of each side [default: what memory has room for, up to 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: Option<u32>,
    /// The most tokens of an answer [default: the context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Requests that may be answered or wait at once; one more is told to come again.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub queue: u32,
    /// The most bytes of a request.
    #[arg(long, default_value = "8MiB", value_name = "SIZE")]
    pub max_body: Bytes,
    /// Seconds that a client may take to send a request, or to read a part of an answer.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// Seconds that answers have to end when the server is asked to stop.
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    pub grace: u32,
    /// No log, only errors.
    #[arg(short, long)]
    pub quiet: bool,
}
