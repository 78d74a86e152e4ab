//! What other programs accept of an adapter, applied before they are asked.
//!
//! The rules were read in their sources: vLLM 0.14 to 0.22 (`vllm/lora/`), llama.cpp's adapter loader and
//! `convert_lora_to_gguf.py`, PEFT 0.21.

use clap::ValueEnum;

use crate::adapter::{Adapters, Lora};

/// A program that loads adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Consumer {
    /// PEFT on transformers.
    Peft,
    /// vLLM's `--enable-lora`.
    Vllm,
    /// llama.cpp's `--lora`, and Ollama, which is built on it.
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

impl Consumer {
    /// As it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::Vllm => "vllm",
            Self::LlamaCpp => "llama.cpp",
        }
    }
}

/// The form that an adapter is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// PEFT's folder.
    Peft,
    /// llama.cpp's file.
    Gguf,
}

/// What a rule says of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// It would be refused, or wrong.
    Refused {
        /// What is in the way.
        problem: String,
        /// What to do.
        help: &'static str,
    },
    /// Worth knowing.
    Note(String),
}

/// Ranks that vLLM can be started with, `--max-lora-rank`; it starts with 16.
const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
const VLLM_DEFAULT_RANK: usize = 16;

/// What `consumer` would say to `adapters` in that `form`, on a base of the name `base`.
#[must_use]
pub fn check(consumer: Consumer, adapters: &Adapters, form: Form, base: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut refuse = |problem: &str, help| findings.push(Finding::Refused { problem: problem.into(), help });
    let config = adapters.config();
    let rank = adapters.iter().map(Lora::rank).max().unwrap_or(0);
    let patterned =
        adapters.iter().any(|lora| lora.rank() != rank || lora.scale() != config.scale(rank, config.alpha));
    const MERGE: &str = "merge it: dpo-lora merge";
    const FOLD: &str = "--scale-into-b writes one rank and a scale of 1, and computes the same";
    match (consumer, form) {
        (Consumer::Peft | Consumer::Vllm, Form::Gguf) => {
            refuse("it reads no GGUF adapters", "name a folder with --out, which gets PEFT's files");
        }
        (Consumer::Peft, Form::Peft) => {}
        (Consumer::Vllm, Form::Peft) => {
            if config.dora {
                refuse("DoRA is not supported", MERGE);
            }
            if patterned {
                refuse("rank_pattern and alpha_pattern are not read: some modules would get another scale", FOLD);
            }
            if rank > VLLM_RANKS[VLLM_RANKS.len() - 1] {
                refuse("the rank is above 512, the largest --max-lora-rank", "cut it: --rank 512");
            }
        }
        (Consumer::LlamaCpp, form) => {
            if config.dora {
                refuse("DoRA is not supported", MERGE);
            }
            if form == Form::Peft && (patterned || config.rslora) {
                let problem = "convert_lora_to_gguf.py reads neither use_rslora nor rank_pattern and alpha_pattern: the scale \
                               would be wrong";
                refuse(problem, "name a file that ends in .gguf with --out, or add --scale-into-b");
            }
        }
    }
    if findings.is_empty() {
        let note = match (consumer, form) {
            (Consumer::Vllm, _) => {
                let served = VLLM_RANKS.iter().find(|&&served| served >= rank).copied().unwrap_or(rank);
                let flag =
                    if served > VLLM_DEFAULT_RANK { format!(" --max-lora-rank {served}") } else { String::new() };
                format!("vllm serve {base} --enable-lora{flag} --lora-modules policy=DIR")
            }
            (Consumer::Peft, _) => {
                format!("PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base:?}), DIR)")
            }
            (Consumer::LlamaCpp, Form::Gguf) => "llama-cli -m BASE.gguf --lora FILE.gguf".to_owned(),
            (Consumer::LlamaCpp, Form::Peft) => {
                "it loads a GGUF file: name one with --out, or run convert_lora_to_gguf.py DIR".to_owned()
            }
        };
        findings.push(Finding::Note(note));
    }
    findings
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::adapter::{LoraConfig, Targets};
    use crate::model::Module;

    fn adapters(config: &LoraConfig) -> Adapters {
        let module = |path: &str| Module { path: path.into(), inputs: 600, outputs: 600 };
        let modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"].map(module);
        crate::adapter::new(config, &modules, 1, DType::F32, &Device::Cpu).expect("made")
    }

    fn refused(consumer: Consumer, config: &LoraConfig, form: Form) -> Vec<String> {
        let of = |finding: &Finding| match finding {
            Finding::Refused { problem, .. } => Some(problem.clone()),
            Finding::Note(_) => None,
        };
        check(consumer, &adapters(config), form, "org/base").iter().filter_map(of).collect()
    }

    #[test]
    fn what_a_consumer_would_get_wrong_is_refused() {
        let plain = LoraConfig { rank: 8, targets: Targets::AllLinear, ..LoraConfig::default() };
        let dora = LoraConfig { dora: true, ..plain.clone() };
        let patterned = LoraConfig { ranks: vec![("up_proj".into(), 4)], ..plain.clone() };
        let scaled = LoraConfig { alphas: vec![("up_proj".into(), 4.0)], ..plain.clone() };
        let rslora = LoraConfig { rslora: true, ..plain.clone() };
        let large = LoraConfig { rank: 513, ..plain.clone() };
        for (consumer, form, config, refusals) in [
            (Consumer::Peft, Form::Peft, &dora, 0),
            (Consumer::Peft, Form::Gguf, &plain, 1),
            (Consumer::Vllm, Form::Peft, &plain, 0),
            (Consumer::Vllm, Form::Peft, &rslora, 0),
            (Consumer::Vllm, Form::Peft, &dora, 1),
            (Consumer::Vllm, Form::Peft, &patterned, 1),
            (Consumer::Vllm, Form::Peft, &scaled, 1),
            (Consumer::Vllm, Form::Peft, &large, 1),
            (Consumer::LlamaCpp, Form::Gguf, &rslora, 0),
            (Consumer::LlamaCpp, Form::Gguf, &patterned, 0),
            (Consumer::LlamaCpp, Form::Gguf, &dora, 1),
            (Consumer::LlamaCpp, Form::Peft, &rslora, 1),
            (Consumer::LlamaCpp, Form::Peft, &scaled, 1),
        ] {
            assert_eq!(refused(consumer, config, form).len(), refusals, "{consumer:?} {form:?} {config:?}");
        }
        // what was folded is taken
        let folded = adapters(&LoraConfig { rslora: true, ..patterned }).scaled_into_b().expect("folded");
        for consumer in [Consumer::Vllm, Consumer::LlamaCpp] {
            assert!(matches!(check(consumer, &folded, Form::Peft, "org/base")[..], [Finding::Note(_)]));
        }
    }

    #[test]
    fn vllm_is_started_with_a_rank_that_it_knows() {
        for (rank, flag) in [(8, None), (16, None), (24, Some(32)), (300, Some(320))] {
            let config = LoraConfig { rank, ..LoraConfig::default() };
            let findings = check(Consumer::Vllm, &adapters(&config), Form::Peft, "org/base");
            let [Finding::Note(note)] = &findings[..] else { panic!("{findings:?}") };
            let expected = flag.map_or(String::new(), |rank| format!(" --max-lora-rank {rank}"));
            assert_eq!(*note, format!("vllm serve org/base --enable-lora{expected} --lora-modules policy=DIR"));
        }
    }
}
