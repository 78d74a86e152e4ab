//! What a model says of token ids, for comparison with other programs; and the library in forty lines.
//!
//! ```text
//! cargo run --release --example logits -- BASE [ADAPTER] --greedy 20 < ids.jsonl
//! ```
//!
//! `BASE` is a folder or a GGUF file, `ADAPTER` a folder of PEFT's. Each line of the input is a list of token ids. For each,
//! a line comes out: `logits`, those after every id but the last, and `greedy`, the ids that follow the last one.
#![expect(clippy::print_stdout, reason = "it is read by scripts")]

use std::io::BufRead;
use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Parser;
use dpo_lora::adapter::{self, LoraConfig, peft};
use dpo_lora::model::generate::Stop;
use dpo_lora::model::{Adapter, Base, Model, Packer, PromptSpan};
use dpo_lora::progress::Console;
use dpo_lora::quant::Quant;
use miette::IntoDiagnostic;
use serde_json::json;

#[derive(Parser)]
struct Arguments {
    base: PathBuf,
    adapter: Option<PathBuf>,
    /// How the base is kept in memory.
    #[arg(long, default_value = "none", value_parser = Quant::by_name)]
    quant: Quant,
    /// How many ids are to follow.
    #[arg(long, default_value_t = 0)]
    greedy: usize,
}

fn main() -> miette::Result<()> {
    let Arguments { base, adapter, quant, greedy } = Arguments::parse();
    let base = Base::local(&base)?;
    let config = base.config(quant)?;
    let (modules, side) = (config.modules(), if adapter.is_some() { Adapter::On } else { Adapter::Off });
    let adapters = match adapter {
        Some(folder) => peft::load(&folder, &modules, DType::F32)?,
        None => adapter::new(&LoraConfig::default(), &modules, 0, DType::F32, &Device::Cpu)?,
    };
    let (decoder, _) = base.load(config, &Console::silent())?;
    let model = Model::new(decoder, adapters).into_diagnostic()?;
    let stop = Stop { tokens: &[], max_new_tokens: greedy };
    for line in std::io::stdin().lock().lines() {
        let ids: Vec<u32> = serde_json::from_str(&line.into_diagnostic()?).into_diagnostic()?;
        // the first id is a prompt, all others are what it is asked to have said
        let mut packer = Packer::default();
        packer.push(0, &ids[..1], &[&ids[1..]], PromptSpan::No);
        let adapters = (side == Adapter::On).then(|| model.adapters());
        let hidden = model.decoder().hidden(&packer.finish(), adapters).into_diagnostic()?;
        let logits = model.decoder().head().logits(&hidden).and_then(|logits| logits.to_vec2::<f32>());
        let greedy = model.generate(&ids, side, &stop).into_diagnostic()?;
        println!("{}", json!({ "logits": logits.into_diagnostic()?, "greedy": greedy }));
    }
    Ok(())
}
