//! A fresh adapter. By default initialised as PEFT does: `A` Kaiming-uniform with `a = √5`, which is
//! `U(−1/√in, 1/√in)`, and `B` zero, so that the policy begins as the reference.
//!
//! PiSSA and OLoRA begin with a part of the matrix itself. PEFT then takes it out of the base, and with the adapters off
//! there is another model than there was. Here the base stays, and the first value is taken out by a frozen update of
//! its own.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::{AdapterError, Adapters, Dora, InitialWeights, Lora, LoraConfig, svd};
use crate::model::{Decoder, Module};
use crate::progress::Console;

/// Adapters on the targeted ones of `modules`.
///
/// Each module draws from a stream of its own, named by the seed and its path: adding a target changes no other's
/// values. Values that are made of the base, and DoRA's lengths, come with [`Adapters::fit`].
///
/// # Errors
/// Targets that match nothing, or what candle returns.
pub fn new(
    config: &LoraConfig,
    modules: &[Module],
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Result<Adapters, AdapterError> {
    let selected = config.select(modules)?;
    let adapters = modules.iter().zip(selected).map(|(module, selected)| {
        let Some((rank, scale)) = selected else { return Ok(None) };
        let mut rng = stream(seed, &module.path);
        // 24 bits: every value an f32 between 0 and 1 on an even grid
        let uniform = |rng: &mut ChaCha8Rng| f64::from(rng.next_u32() >> 8) / f64::from(1u32 << 24);
        let a: Vec<f32> = match config.weights {
            InitialWeights::Gaussian => {
                (0..rank * module.inputs).map(|_| (svd::normal(&mut rng) / rank as f64) as f32).collect()
            }
            _ => {
                let bound = 1.0 / (module.inputs as f64).sqrt();
                (0..rank * module.inputs).map(|_| ((2.0 * uniform(&mut rng) - 1.0) * bound) as f32).collect()
            }
        };
        let a = Tensor::from_vec(a, (rank, module.inputs), device)?.to_dtype(dtype)?;
        let b = Tensor::zeros((module.outputs, rank), dtype, device)?;
        let mut lora = Lora::new(&module.path, a, b, scale);
        if config.dora {
            lora.dora = Some(Dora { magnitude: Tensor::zeros(module.outputs, dtype, device)?, norms: None });
        }
        Ok(Some(lora))
    });
    let modules = adapters.collect::<Result<_, candle_core::Error>>()?;
    Ok(Adapters { config: config.clone(), modules })
}

impl Adapters {
    /// Puts new adapters on top of others, which are not trained.
    ///
    /// # Errors
    /// One below stands where no new one does, or trains lengths of its own.
    pub fn stack(mut self, below: &Self) -> Result<Self, AdapterError> {
        for (new, below) in self.modules.iter_mut().zip(&below.modules) {
            let Some(below) = below else { continue };
            if below.dora.is_some() {
                return Err(AdapterError::Mismatch {
                    problem: "[adapter] init is a DoRA adapter, and nothing can be stacked on one".into(),
                    help: "merge it into the base first: dpo-lora merge; or go on with it: init_mode = \"continue\""
                        .into(),
                });
            }
            let Some(lora) = new.take() else {
                return Err(AdapterError::Mismatch {
                    problem: format!(
                        "the adapter of `init` has `{}`, and [adapter] targets and layers leave it out",
                        below.module
                    ),
                    help: "a stacked adapter has to stand on every module that the one below has".into(),
                });
            };
            let b = (below.b() * (below.scale / lora.scale))?;
            *new = Some(lora.on([below.a().clone(), b])?);
        }
        Ok(self)
    }

    /// Makes of new adapters what depends on the base: the values that are a part of it, and DoRA's lengths.
    ///
    /// # Errors
    /// What candle returns.
    pub fn fit(&mut self, decoder: &Decoder, seed: u64, console: &Console) -> Result<(), AdapterError> {
        let weights = self.config.weights;
        if matches!(weights, InitialWeights::Pissa | InitialWeights::Olora) {
            let bar = console.count_bar("decomposing", self.iter().count() as u64);
            // one thread a matrix; each needs it dense, and its draws are its own
            self.modules.par_iter_mut().enumerate().try_for_each(|(module, lora)| {
                let Some(lora) = lora else { return Ok(()) };
                let weight = decoder.module(module).dense(DType::F32)?;
                let (rank, dtype) = (lora.own[0].dims()[0], lora.own[0].dtype());
                let [a, b] = match weights {
                    InitialWeights::Pissa => {
                        let mut rng = stream(seed, &lora.module);
                        let svd::Svd { u, s, v } = svd::largest(&weight, rank, &mut rng)?;
                        let root = s.affine(1.0 / lora.scale, 0.0)?.sqrt()?;
                        [v.broadcast_mul(&root)?.t()?.contiguous()?, u.broadcast_mul(&root)?]
                    }
                    _ => {
                        let q = svd::orthonormal(&weight.narrow(1, 0, rank)?)?;
                        [q.t()?.matmul(&weight)?, q]
                    }
                };
                let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
                let minus = b.neg()?;
                let mut frozen = vec![[a.clone(), minus]];
                frozen.extend(lora.frozen.take());
                let both = |side: usize, dim| {
                    Tensor::cat(&frozen.iter().map(|frozen| &frozen[side]).collect::<Vec<_>>(), dim)
                };
                lora.own = [a, b];
                lora.frozen = Some([both(0, 0)?, both(1, 1)?]);
                lora.join()?;
                bar.advance(1);
                Ok::<_, candle_core::Error>(())
            })?;
        }
        self.measure(decoder)?;
        for lora in self.modules.iter_mut().flatten() {
            if let Some(Dora { magnitude, norms: Some(norms) }) = &mut lora.dora {
                *magnitude = norms.whole.clone();
            }
        }
        Ok(())
    }
}

fn stream(seed: u64, path: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new_derive_key("dpo-lora adapter initialisation");
    hasher.update(&seed.to_le_bytes());
    hasher.update(path.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Targets;

    fn modules() -> Vec<Module> {
        let module = |path: &str| Module { path: path.into(), inputs: 64, outputs: 32 };
        vec![module("model.layers.0.self_attn.q_proj"), module("model.layers.0.mlp.up_proj")]
    }

    fn config(targets: Targets) -> LoraConfig {
        LoraConfig { rank: 8, alpha: 16.0, targets, ..LoraConfig::default() }
    }

    #[test]
    fn a_is_uniform_within_the_kaiming_bound_and_b_is_zero() {
        let adapters = new(&config(Targets::AllLinear), &modules(), 3, DType::F32, &Device::Cpu).expect("made");
        assert!(adapters.is_zero().expect("read"));
        let a = adapters.get(0).expect("targeted").a().flatten_all().expect("flat").to_vec1::<f32>().expect("f32");
        assert!(a.iter().all(|a| a.abs() <= 0.125));
        // the variance of U(−b, b) is b²/3 = 0.005208; 512 draws estimate it to about 4 %
        let variance = a.iter().map(|a| a * a).sum::<f32>() / a.len() as f32;
        assert!((variance - 0.005_208).abs() < 0.001, "{variance}");
        assert_eq!(adapters.num_parameters(), 2 * 8 * (64 + 32));
    }

    #[test]
    fn a_module_draws_the_same_whatever_else_is_targeted() {
        let only = config(Targets::Names(vec!["up_proj".into()]));
        let one = new(&only, &modules(), 3, DType::F32, &Device::Cpu).expect("made");
        let all = new(&config(Targets::AllLinear), &modules(), 3, DType::F32, &Device::Cpu).expect("made");
        let a = |adapters: &Adapters| adapters.get(1).expect("targeted").a().to_vec2::<f32>().expect("f32");
        assert!(one.get(0).is_none());
        assert_eq!(a(&one), a(&all));
        assert_ne!(all.get(0).expect("targeted").a().to_vec2::<f32>().expect("f32"), a(&all));
    }

    #[test]
    fn rslora_scales_by_the_root_of_the_rank() {
        let plain = LoraConfig { rank: 16, ..config(Targets::AllLinear) };
        assert_eq!(plain.scale(16, 16.0), 1.0);
        assert_eq!(LoraConfig { rslora: true, ..plain }.scale(16, 16.0), 4.0);
    }
}
