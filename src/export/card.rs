//! The model card, as the Hub reads it: what the model is made of, what came out, and how to load it.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::adapter::Adapters;
use crate::hub;
use crate::loss::Loss;

/// What a card is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An adapter in PEFT's files.
    Adapter,
    /// A merged model in a Hugging Face folder.
    Merged,
}

/// What a card says.
#[derive(Debug)]
pub struct Card<'c> {
    /// What it is of.
    pub kind: Kind,
    /// The base as the recipe or the adapter names it: a path, or `ORG/NAME`.
    pub base: &'c str,
    /// How the base was kept while training.
    pub quant: &'static str,
    /// The base's own card, for its licence.
    pub base_card: Option<String>,
    /// What was trained.
    pub adapters: &'c Adapters,
    /// What it was trained with.
    pub loss: Option<&'c Loss>,
    /// The recipe as it was written.
    pub recipe: Option<String>,
    /// `summary.json` of the run.
    pub summary: Option<Value>,
    /// `hf://` addresses in the recipe, and paths.
    pub data: Vec<String>,
}

impl Card<'_> {
    /// README.md.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = self.front_matter();
        let (base, what) = (self.base_link(), self.what());
        let _ = writeln!(text, "\n# {what}\n");
        let config = self.adapters.config();
        let modules = self.adapters.iter().count();
        let variant = if config.dora { "DoRA" } else { "LoRA" };
        match self.kind {
            Kind::Adapter => _ = writeln!(text, "A {variant} adapter on {base}, on {modules} linear modules."),
            Kind::Merged => {
                _ = writeln!(
                    text,
                    "{base} with a {variant} adapter on {modules} linear modules merged into its weights."
                );
            }
        }
        if let Some(loss) = self.loss {
            let beta = loss.beta().map_or(String::new(), |beta| format!(" (beta {beta})"));
            let paper = paper(loss).map_or(String::new(), |(title, url)| format!(": [{title}]({url})"));
            let _ = writeln!(text, "Trained with {}{beta}{paper}.", loss.name().to_uppercase());
        }
        self.usage(&mut text);
        self.results(&mut text);
        self.training(&mut text);
        text
    }

    fn what(&self) -> String {
        let base = shown(self.base.rsplit('/').next().unwrap_or_default());
        let loss = self.loss.map_or(String::new(), |loss| format!(", {}", loss.name().to_uppercase()));
        match self.kind {
            Kind::Adapter => format!("{base}{loss}: adapter"),
            Kind::Merged => format!("{base}{loss}"),
        }
    }

    /// The base, with a link if it is on the hub.
    fn base_link(&self) -> String {
        match hub::is_id(self.base) {
            true => format!("[{0}](https://huggingface.co/{0})", self.base),
            false => format!("`{}`", shown(self.base)),
        }
    }

    fn front_matter(&self) -> String {
        // JSON strings are YAML strings
        let quoted = |text: &str| Value::from(text).to_string();
        let mut text = String::from("---\n");
        let mut tags = Vec::new();
        // the hub refuses a base that it does not have
        if hub::is_id(self.base) {
            let (relation, tag) = match self.kind {
                Kind::Adapter => ("adapter", "adapter"),
                Kind::Merged => ("finetune", "finetune"),
            };
            let _ = writeln!(text, "base_model: {}\nbase_model_relation: {relation}", quoted(self.base));
            tags.push(format!("base_model:{tag}:{}", self.base));
        }
        if let Some(license) = self.base_card.as_deref().and_then(license) {
            let _ = writeln!(text, "license: {}", quoted(license));
        }
        let library = if self.kind == Kind::Adapter { "peft" } else { "transformers" };
        let _ = writeln!(text, "library_name: {library}\npipeline_tag: text-generation");
        let datasets: Vec<&str> = self.data.iter().filter_map(|data| dataset_id(data)).collect();
        if !datasets.is_empty() {
            let _ = writeln!(text, "datasets:");
            datasets.iter().for_each(|id| _ = writeln!(text, "- {}", quoted(id)));
        }
        tags.extend(["lora", "transformers"].map(String::from));
        tags.extend(self.loss.map(|loss| loss.name().to_owned()));
        tags.push("dpo-lora".into());
        let _ = writeln!(text, "tags:");
        tags.iter().for_each(|tag| _ = writeln!(text, "- {}", quoted(tag)));
        text + "---\n"
    }

    fn usage(&self, text: &mut String) {
        let base = shown(self.base);
        let _ = match self.kind {
            Kind::Adapter => write!(
                text,
                "\n## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 base = AutoModelForCausalLM.from_pretrained({base:?})\nmodel = PeftModel.from_pretrained(base, \"PATH\")\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"PATH\")\n```\n\nWith the adapter off (`model.disable_adapter()`) it is the \
                 base.\n"
            ),
            Kind::Merged => write!(
                text,
                "\n## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 model = AutoModelForCausalLM.from_pretrained(\"PATH\")\ntokenizer = AutoTokenizer.from_pretrained(\"PATH\")\n```\n"
            ),
        };
    }

    fn results(&self, text: &mut String) {
        let Some(summary) = &self.summary else { return };
        let number = |when: &str, name: &str| summary[when][name].as_f64();
        let shown = [
            ("logps/accuracies", "prefers the chosen answer", 3),
            ("rewards/accuracies", "reward accuracy", 3),
            ("rewards/margins", "reward margin", 3),
            ("loss", "loss", 4),
            ("logps/chosen", "log-prob of chosen", 1),
            ("logps/rejected", "log-prob of rejected", 1),
            ("perplexity", "perplexity of chosen", 2),
            ("kl_to_reference", "KL to the reference a token, on the data", 4),
        ];
        let rows: Vec<String> = shown
            .into_iter()
            .filter_map(|(name, label, digits)| {
                let (before, after) = (number("before", name)?, number("after", name)?);
                Some(format!("| {label} | {before:.digits$} | {after:.digits$} |\n"))
            })
            .collect();
        if !rows.is_empty() {
            let pairs = summary["data"]["eval"]["facts"]["examples"].as_u64();
            let of = pairs.map_or(String::new(), |pairs| format!(" ({pairs} examples)"));
            let _ = write!(
                text,
                "\n## Results\n\nOn held-out data{of}:\n\n| | before | after |\n|---|---:|---:|\n{}",
                rows.concat()
            );
        }
    }

    fn training(&self, text: &mut String) {
        let config = self.adapters.config();
        let _ = write!(text, "\n## Training\n\n| | |\n|---|---|\n");
        let mut row = |name: &str, value: String| _ = writeln!(text, "| {name} | {} |", value.replace('|', "\\|"));
        let scale = if config.rslora { " (rsLoRA)" } else { "" };
        row("rank, alpha", format!("{}, {}{scale}", config.rank, config.alpha));
        row("modules", format!("`{}`", config.targets));
        if self.quant != "none" {
            row("base kept in", self.quant.to_owned());
        }
        if !self.data.is_empty() {
            row("data", self.data.iter().map(|data| format!("`{}`", shown(data))).collect::<Vec<_>>().join(", "));
        }
        if let Some(summary) = &self.summary {
            let count = |value: &Value| value.as_u64().map(|count| count.to_string());
            let known = [
                ("updates", count(&summary["steps"])),
                ("tokens", count(&summary["num_tokens"])),
                ("seconds", summary["seconds"].as_f64().map(|seconds| format!("{seconds:.0}"))),
                ("peak memory", summary["peak_memory_bytes"].as_u64().map(|b| crate::bytes::shown(b as usize))),
                ("dpo-lora", summary["version"].as_str().map(ToOwned::to_owned)),
                ("hash of the base", summary["hashes"]["base"].as_str().map(|hash| format!("`{hash}`"))),
                ("hash of the data", summary["hashes"]["train"].as_str().map(|hash| format!("`{hash}`"))),
            ];
            known.into_iter().for_each(|(name, value)| {
                if let Some(value) = value {
                    row(name, value);
                }
            });
        }
        if let Some(recipe) = &self.recipe {
            // a fence longer than any in it
            let fence = "`".repeat(3.max(1 + longest_run(recipe, '`')));
            let _ = write!(text, "\nThe recipe:\n\n{fence}toml\n{}\n{fence}\n", recipe.trim_end());
        }
    }
}

/// A name of the hub as it is, of a path only its end: what stands where on a machine is nobody's business.
fn shown(name: &str) -> Cow<'_, str> {
    match hub::is_id(name) || hub::is_address(Path::new(name)) {
        true => name.into(),
        false => Path::new(name).file_name().unwrap_or_default().to_string_lossy(),
    }
}

fn longest_run(text: &str, of: char) -> usize {
    text.split(|c| c != of).map(str::len).max().unwrap_or(0)
}

/// The licence in a card's front matter.
fn license(card: &str) -> Option<&str> {
    let (front, _) = card.strip_prefix("---")?.split_once("\n---")?;
    let line = front.lines().find_map(|line| line.strip_prefix("license:"))?;
    let name = line.trim().trim_matches(['"', '\'']);
    (!name.is_empty()).then_some(name)
}

/// `ORG/NAME` of a data set of the hub.
fn dataset_id(address: &str) -> Option<&str> {
    let rest = address.strip_prefix("hf://datasets/")?;
    let slash = rest.match_indices('/').nth(1).map_or(rest.len(), |(at, _)| at);
    Some(rest[..slash].split('@').next().unwrap_or_default()).filter(|id| hub::is_id(id))
}

fn paper(loss: &Loss) -> Option<(&'static str, &'static str)> {
    Some(match loss {
        Loss::Dpo(_) => ("Direct Preference Optimization", "https://arxiv.org/abs/2305.18290"),
        Loss::Ipo(_) => (
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            "https://arxiv.org/abs/2310.12036",
        ),
        Loss::Kto(_) => {
            ("KTO: Model Alignment as Prospect Theoretic Optimization", "https://arxiv.org/abs/2402.01306")
        }
        Loss::Orpo(_) => {
            ("ORPO: Monolithic Preference Optimization without Reference Model", "https://arxiv.org/abs/2403.07691")
        }
        Loss::Sft(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_and_a_data_set_are_found() {
        assert_eq!(license("---\ntags:\n- a\nlicense: apache-2.0\n---\n# A"), Some("apache-2.0"));
        assert_eq!(license("---\nlicense: \"llama3.1\"\r\n---\n"), Some("llama3.1"));
        assert_eq!(license("# A\nlicense: mit\n"), None);
        assert_eq!(dataset_id("hf://datasets/org/name/train_prefs"), Some("org/name"));
        assert_eq!(dataset_id("hf://datasets/org/name@v2/train"), Some("org/name"));
        assert_eq!(dataset_id("/home/me/a.parquet"), None);
    }
}
