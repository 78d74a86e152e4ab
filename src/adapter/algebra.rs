//! Adapters made of adapters, without the base: several added up, cut to a lower rank, brought to one plain scale.

use candle_core::{DType, Result, Tensor};

use super::{AdapterError, Adapters, InitialWeights, Lora, LoraConfig, Targets, svd};

/// How much of an update was lost by cutting it to a rank, `‖ΔW − ΔW_r‖ / ‖ΔW‖`.
#[derive(Debug, Clone, PartialEq)]
pub struct Truncation {
    /// Over all modules together.
    pub total: f64,
    /// The module that lost most, and how much.
    pub worst: (String, f64),
}

impl Adapters {
    /// The sum of adapters on one model, each with a weight: `Σ wᵢ sᵢ Bᵢ Aᵢ`, exactly, as one adapter whose rank is the
    /// sum of theirs and whose scale is 1.
    ///
    /// # Errors
    /// One of several is a DoRA adapter, whose rows are no sum; or what candle returns.
    ///
    /// # Panics
    /// There is none, or they are of models with different modules.
    pub fn sum(terms: &[(Self, f64)]) -> std::result::Result<Self, AdapterError> {
        let (first, _) = terms.first().expect("at least one adapter");
        if let [(only, 1.0)] = terms {
            return Ok(only.clone());
        }
        if terms.iter().any(|(adapters, _)| adapters.iter().any(|lora| lora.dora.is_some())) {
            return Err(AdapterError::Mismatch {
                problem: "a DoRA adapter can neither be added to another nor weighted".into(),
                help: "its rows are brought to lengths of their own; merge it into the base, and go on from there"
                    .into(),
            });
        }
        let modules = (0..first.modules.len()).map(|module| {
            let of_module: Vec<(&Lora, f64)> =
                terms.iter().filter_map(|(adapters, weight)| Some((adapters.get(module)?, *weight))).collect();
            let Some((some, _)) = of_module.first() else { return Ok(None) };
            let a: Vec<&Tensor> = of_module.iter().map(|(lora, _)| lora.a()).collect();
            let b = of_module
                .iter()
                .map(|(lora, weight)| lora.b() * (lora.scale * weight))
                .collect::<Result<Vec<_>>>()?;
            Ok(Some(Lora::new(&some.module, Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?, 1.0)))
        });
        let modules = modules.collect::<Result<Vec<_>>>()?;
        Ok(Self::plain(first.config.clone(), modules, terms.iter().map(|(adapters, _)| adapters)))
    }

    /// The best approximation of rank `rank` on every module (truncated SVD of `s B A`, which is never formed), with a
    /// scale of 1, and what it loses. A module of a lower rank stays what it is.
    ///
    /// # Errors
    /// It is a DoRA adapter, or what candle returns.
    pub fn truncated(&self, rank: usize) -> std::result::Result<(Self, Truncation), AdapterError> {
        let (mut lost_in_all, mut in_all) = (0.0, 0.0);
        let mut worst = (String::new(), 0.0);
        let mut modules = Vec::new();
        for lora in &self.modules {
            let Some(lora) = lora else {
                modules.push(None);
                continue;
            };
            if lora.dora.is_some() {
                return Err(AdapterError::Mismatch {
                    problem: "a DoRA adapter cannot be cut to a lower rank".into(),
                    help: "the lengths of its rows belong to the update as it is".into(),
                });
            }
            let scaled = (lora.b().to_dtype(DType::F32)? * lora.scale)?;
            if lora.rank() <= rank {
                modules.push(Some(Lora::new(&lora.module, lora.a().clone(), scaled, 1.0)));
                continue;
            }
            let svd::Svd { u, s, v } = svd::of_product(&scaled, &lora.a().to_dtype(DType::F32)?.t()?, lora.rank())?;
            let values: Vec<f64> = s.to_dtype(DType::F64)?.to_vec1()?;
            let square = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
            let (whole, lost) = (square(&values), square(values.get(rank..).unwrap_or_default()));
            (in_all, lost_in_all) = (in_all + whole, lost_in_all + lost);
            let share = if whole > 0.0 { (lost / whole).sqrt() } else { 0.0 };
            if share >= worst.1 {
                worst = (lora.module.clone(), share);
            }
            let kept = rank.min(values.len());
            let root = s.narrow(0, 0, kept)?.sqrt()?;
            let a = v.narrow(1, 0, kept)?.broadcast_mul(&root)?.t()?.contiguous()?;
            let b = u.narrow(1, 0, kept)?.broadcast_mul(&root)?;
            modules.push(Some(Lora::new(&lora.module, a, b, 1.0)));
        }
        let total = if in_all > 0.0 { f64::sqrt(lost_in_all / in_all) } else { 0.0 };
        Ok((Self::plain(self.config.clone(), modules, [self]), Truncation { total, worst }))
    }

    /// The same update with one rank and a scale of 1 on every module, for readers that know no patterns and no rsLoRA:
    /// scales go into `B`, and lower ranks are filled up with zeros.
    ///
    /// # Errors
    /// What candle returns.
    pub fn scaled_into_b(&self) -> Result<Self> {
        let rank = self.iter().map(Lora::rank).max().unwrap_or(0);
        let one = |lora: &Lora| {
            let b = (lora.b() * lora.scale)?;
            let spare = rank - lora.rank();
            let a = lora.a().pad_with_zeros(0, 0, spare)?;
            let mut new = Lora::new(&lora.module, a, b.pad_with_zeros(1, 0, spare)?, 1.0);
            new.dora = lora.dora.clone();
            Ok(new)
        };
        let modules = self.modules.iter().map(|lora| lora.as_ref().map(one).transpose()).collect::<Result<_>>()?;
        Ok(Self::plain(self.config.clone(), modules, [self]))
    }

    /// `modules`, whose scales are 1, on what `parts` were on.
    fn plain<'p>(config: LoraConfig, modules: Vec<Option<Lora>>, parts: impl IntoIterator<Item = &'p Self>) -> Self {
        let parts: Vec<&Self> = parts.into_iter().collect();
        let on = |adapters: &Self| (adapters.config.targets.clone(), adapters.config.layers.clone());
        let alike = parts.iter().all(|part| on(part) == on(parts[0]));
        let rank = modules.iter().flatten().map(Lora::rank).max().unwrap_or(config.rank);
        let (targets, layers) = match alike {
            true => (config.targets, config.layers),
            // of what is on some modules of a name and not on others, every one by its path
            false => (Targets::Names(modules.iter().flatten().map(|lora| lora.module.clone()).collect()), None),
        };
        let config = LoraConfig {
            rank,
            alpha: rank as f64,
            rslora: false,
            dropout: 0.0,
            targets,
            layers,
            ranks: Vec::new(),
            alphas: Vec::new(),
            weights: InitialWeights::default(),
            dora: config.dora,
        };
        Self { config, modules }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::Module;

    fn modules() -> Vec<Module> {
        let module = |path: &str| Module { path: path.into(), inputs: 24, outputs: 18 };
        ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
            .map(module)
            .to_vec()
    }

    fn adapters(config: LoraConfig, seed: u64) -> Adapters {
        let mut adapters = crate::adapter::new(&config, &modules(), seed, DType::F32, &Device::Cpu).expect("made");
        let random = |tensor: &Tensor| Tensor::rand(-1f32, 1.0, tensor.dims(), &Device::Cpu).expect("made");
        let tensors: Vec<Tensor> = adapters.tensors().map(|(_, tensor)| random(tensor)).collect();
        adapters.replace(tensors).expect("replaced");
        adapters
    }

    fn update(adapters: &Adapters, module: usize) -> Tensor {
        let zero = Tensor::zeros((18, 24), DType::F32, &Device::Cpu).expect("made");
        adapters.get(module).map_or(Ok(zero.clone()), |lora| lora.merged(&zero)).expect("merged")
    }

    fn distance(one: &Tensor, two: &Tensor) -> f32 {
        let square = (one - two).and_then(|d| d.sqr()).and_then(|d| d.sum_all()).and_then(|d| d.to_scalar::<f32>());
        square.expect("of one shape").sqrt()
    }

    fn of(rank: usize, targets: &[&str], rslora: bool) -> LoraConfig {
        let targets = Targets::Names(targets.iter().map(|&name| name.into()).collect());
        LoraConfig { rank, alpha: 5.0, rslora, targets, ..LoraConfig::default() }
    }

    #[test]
    fn a_sum_is_the_sum_of_the_updates() {
        let one = adapters(of(3, &["q_proj", "up_proj"], false), 1);
        let two = adapters(LoraConfig { layers: Some(vec![1]), ..of(4, &["up_proj"], true) }, 2);
        let sum = Adapters::sum(&[(one.clone(), 0.5), (two.clone(), -2.0)]).expect("added");
        for module in 0..3 {
            let expected =
                ((update(&one, module) * 0.5).and_then(|one| one - (update(&two, module) * 2.0)?)).expect("added");
            // entries of size ten, seven digits
            assert!(distance(&update(&sum, module), &expected) < 1e-4);
        }
        assert_eq!(sum.iter().map(Lora::rank).collect::<Vec<_>>(), [3, 3, 7]);
        // what is written of it is read as the same
        let folder = tempfile::tempdir().expect("a folder");
        crate::adapter::peft::save(&sum, "base", folder.path()).expect("written");
        let again = crate::adapter::peft::load(folder.path(), &modules(), DType::F32).expect("read");
        assert!(again.same(&sum).expect("compared"));
    }

    #[test]
    fn a_cut_adapter_loses_what_it_says() {
        let whole = adapters(of(6, &["q_proj", "up_proj"], true), 3);
        let (cut, Truncation { total, worst }) = whole.truncated(4).expect("cut");
        let (mut lost, mut all) = (0.0, 0.0);
        for module in 0..3 {
            let zero = update(&whole, module).zeros_like().expect("made");
            lost += f64::from(distance(&update(&whole, module), &update(&cut, module))).powi(2);
            all += f64::from(distance(&update(&whole, module), &zero)).powi(2);
        }
        assert!((total - (lost / all).sqrt()).abs() < 1e-5, "{total}");
        assert!(worst.1 >= total && cut.iter().all(|lora| lora.rank() == 4));
        let (same, Truncation { total, .. }) = whole.truncated(6).expect("cut");
        assert_eq!(total, 0.0);
        assert!(distance(&update(&whole, 0), &update(&same, 0)) < 1e-5);
    }

    #[test]
    fn scales_and_ranks_can_all_be_made_one() {
        let config = LoraConfig {
            ranks: vec![("up_proj".into(), 2)],
            alphas: vec![("q_proj".into(), 7.0)],
            ..of(5, &["q_proj", "up_proj"], true)
        };
        let patterned = adapters(config, 4);
        let plain = patterned.scaled_into_b().expect("made");
        for (module, lora) in plain.iter().enumerate() {
            assert_eq!((lora.rank(), lora.scale()), (5, 1.0));
            assert!(distance(&update(&patterned, module), &update(&plain, module)) < 1e-5);
        }
        let json: serde_json::Value =
            serde_json::from_str(&crate::adapter::peft::config_json(&plain, "base")).expect("JSON");
        assert_eq!((&json["r"], &json["lora_alpha"], &json["use_rslora"]), (&5.into(), &5.into(), &false.into()));
        assert_eq!((json["rank_pattern"].to_string(), json["alpha_pattern"].to_string()), ("{}".into(), "{}".into()));
    }

    #[test]
    fn dora_is_neither_added_nor_cut() {
        let dora = adapters(LoraConfig { dora: true, ..of(3, &["q_proj"], false) }, 5);
        assert!(Adapters::sum(&[(dora.clone(), 1.0)]).is_ok());
        assert!(Adapters::sum(&[(dora.clone(), 0.5)]).is_err());
        assert!(dora.truncated(2).is_err());
    }
}
