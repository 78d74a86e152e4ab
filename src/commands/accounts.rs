//! What a merge has cost, in a table.

use serde_json::{Value, json};

use super::trained::{Trained, candle};
use super::{Failure, failed, request};
use crate::bytes;
use crate::cli;
use crate::data::Dataset;
use crate::export::Merge;
use crate::export::accounts::{self, Behaviour, LayerAccount, Witnesses};
use crate::machine;
use crate::model::{Base, DecoderConfig};
use crate::progress::{Console, thousands};
use crate::quant::Quant;

/// Both halves of the accounts, and what was asked of them.
pub(super) struct Accounts {
    layers: Vec<LayerAccount>,
    /// Pairs, their tokens, and the models compared on them.
    behaviour: Option<(usize, usize, Vec<Behaviour>)>,
}

/// What a merged model on disk is, and how it is read for comparison: as compactly as it was written.
pub(super) struct Written {
    pub(super) base: Base,
    pub(super) config: DecoderConfig,
    /// In the table.
    pub(super) name: String,
}

impl Written {
    pub(super) fn open(path: &std::path::Path, element_type: Option<&str>) -> Result<Self, Failure> {
        let base = Base::local(path).map_err(request)?;
        let plain = base.config(Quant::None).map_err(request)?;
        let stored = match (base.is_gguf(), element_type) {
            (false, _) => base.files().map_err(request)?.float_of(&plain),
            (true, _) => Quant::None,
        };
        let name = match element_type {
            Some(name) => format!("merged, {name}"),
            None => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        Ok(Self { config: base.config(stored).map_err(request)?, base, name })
    }
}

impl Accounts {
    pub(super) fn take(
        trained: &Trained,
        merge: &Merge<'_>,
        written: &Written,
        data: Option<&Dataset>,
        held_out: &cli::HeldOut,
        console: &Console,
    ) -> Result<Self, Failure> {
        let files = written.base.files().map_err(failed)?;
        let layers = accounts::layers(merge, &files, &written.config, console).map_err(failed)?;
        drop(files);
        let Some(data) = data else { return Ok(Self { layers, behaviour: None }) };

        trained.base.fetch_weights(console).map_err(super::prepare::from_base)?;
        let (decoder, _) = trained.base.load(trained.decoder.clone(), console).map_err(failed)?;
        let pairs = held_out.pairs as usize;
        let (witnesses, [base, policy]) =
            Witnesses::new(data, pairs, &decoder, &trained.adapters, console).map_err(failed)?;
        let mut models = vec![base, policy];
        // in f32 the matrices may be many times what the base is kept in
        let dense = 4 * decoder.config().num_parameters();
        match machine::available_memory() {
            Some(available) if dense > available => console.warning(format_args!(
                "the merged model in f32 takes {}, and {} are available: it is left out of the table",
                bytes::shown(dense),
                bytes::shown(available)
            )),
            _ => {
                let merged = decoder.merged(&trained.adapters).map_err(candle)?;
                models.push(witnesses.behaviour("merged in memory, f32", &merged, console).map_err(failed)?);
            }
        }
        drop(decoder);
        let (decoder, _) = written.base.load(written.config.clone(), console).map_err(failed)?;
        models.push(witnesses.behaviour(&written.name, &decoder, console).map_err(failed)?);
        Ok(Self { layers, behaviour: Some((witnesses.pairs(), witnesses.tokens(), models)) })
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "layers": self.layers,
            "held_out": self.behaviour.as_ref().map(|(pairs, tokens, models)| json!({
                "pairs": pairs, "tokens": tokens, "models": models
            })),
        })
    }

    pub(super) fn tell(&self, console: &Console) {
        console.line("\nthe update in what was written (root mean squares of all weights of a layer)");
        console.line(format_args!(
            "{:<8}{:>12}{:>12}{:>20}{:>10}",
            "layer", "update", "rounding", "update/rounding", "kept"
        ));
        for LayerAccount { layer, update, rounding, kept } in &self.layers {
            let layer = layer.map_or("all".to_owned(), |layer| layer.to_string());
            let ratio = match *rounding {
                0.0 => "exact".to_owned(),
                rounding => format!("{:.3}", update / rounding),
            };
            console
                .line(format_args!("{layer:<8}{update:>12.2e}{rounding:>12.2e}{ratio:>20}{:>8.1} %", 100.0 * kept));
        }
        match &self.behaviour {
            Some((pairs, tokens, models)) => {
                console.line(format_args!(
                    "\n{:<28}{:>10}{:>10}{:>10}{:>14}{:>11}",
                    format!("on {} held-out pairs", thousands(*pairs)),
                    "prefers",
                    "reward",
                    "margin",
                    "KL from base",
                    "same top"
                ));
                console.line(format_args!(
                    "{:<28}{:>10}{:>10}{:>10}{:>14}{:>11}",
                    format!("({} tokens)", thousands(*tokens)),
                    "chosen",
                    "accuracy",
                    "in nats",
                    "+ adapter",
                    "token"
                ));
                for one in models {
                    console.line(format_args!(
                        "{:<28}{:>10.3}{:>10.3}{:>10.3}{:>14}{:>9.1} %",
                        one.model,
                        one.prefers_chosen,
                        one.reward_accuracy,
                        one.margin,
                        kl_text(one.kl),
                        100.0 * one.top1
                    ));
                }
            }
            None => console.line(
                "\nno held-out pairs are known: --data FILE shows what base, base + adapter and the merged model say about them",
            ),
        }
        self.alarm(console);
    }

    /// What should not go unnoticed.
    fn alarm(&self, console: &Console) {
        if let Some(all) = self.layers.last()
            && all.kept < 0.5
        {
            console.warning(format_args!(
                "only {:.0} % of the update is left: most of it is smaller than the rounding; merge to a finer type (q8_0, bf16), \
                 or serve the adapter beside the base",
                100.0 * all.kept.max(0.0)
            ));
        }
        let Some((_, _, models)) = &self.behaviour else { return };
        if let (Some(base), Some(policy), Some(written)) = (models.first(), models.get(1), models.last())
            && written.kl > base.kl / 2.0
            && base.kl > 0.0
        {
            console.warning(format_args!(
                "KL from base + adapter is {}, and that of the base alone {}: what was trained has not come through; its margin \
                 is {:.3} of {:.3}",
                kl_text(written.kl),
                kl_text(base.kl),
                written.margin,
                policy.margin
            ));
        }
    }

    /// Whether the written model is as near as was asked for.
    pub(super) fn check(&self, limit: Option<f64>, console: &Console) -> Result<(), Failure> {
        let Some(limit) = limit else { return Ok(()) };
        let kl = self.behaviour.as_ref().and_then(|(_, _, models)| models.last()).map_or(f64::INFINITY, |one| one.kl);
        // NaN is no small distance
        if kl <= limit {
            return Ok(());
        }
        console.line(format_args!("--fail-if-kl: KL from base + adapter is {}, above {limit}", kl_text(kl)));
        Err(Failure::Gate)
    }
}

fn kl_text(kl: f64) -> String {
    match kl {
        0.0 => "0".to_owned(),
        kl if kl < 1e-4 => format!("{kl:.1e}"),
        kl => format!("{kl:.4}"),
    }
}

#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[error("--fail-if-kl needs held-out pairs, and none are known")]
#[diagnostic(help("name a file of pairs: --data held-out.jsonl"))]
struct NoPairs;

/// Refuses a limit that nothing could be held against.
pub(super) fn check_pairs(held_out: &cli::HeldOut, data: Option<&Dataset>) -> Result<(), Failure> {
    match (held_out.fail_if_kl, data) {
        (Some(_), None) => Err(request(NoPairs)),
        _ => Ok(()),
    }
}
