//! A fresh adapter, initialised as PEFT does: `A` Kaiming-uniform with `a = √5`, which is `U(−1/√in, 1/√in)`, and
//! `B` zero, so that the policy begins as the reference.

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{AdapterError, Adapters, Lora, LoraConfig};
use crate::model::Module;

/// Adapters on the targeted ones of `modules`.
///
/// Each module draws from a stream of its own, named by the seed and its path: adding a target changes no other's
/// values.
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
    let selected = config.targets.select(modules)?;
    let adapters = modules.iter().zip(selected).map(|(module, selected)| {
        if !selected {
            return Ok(None);
        }
        let mut rng = stream(seed, &module.path);
        let bound = 1.0 / (module.inputs as f64).sqrt();
        // 24 bits: every value an f32 between 0 and 1 on an even grid
        let uniform = |rng: &mut ChaCha8Rng| f64::from(rng.next_u32() >> 8) / f64::from(1u32 << 24);
        let a: Vec<f32> =
            (0..config.rank * module.inputs).map(|_| ((2.0 * uniform(&mut rng) - 1.0) * bound) as f32).collect();
        Ok(Some(Lora {
            module: module.path.clone(),
            a: Tensor::from_vec(a, (config.rank, module.inputs), device)?.to_dtype(dtype)?,
            b: Tensor::zeros((module.outputs, config.rank), dtype, device)?,
            scale: config.scale(),
        }))
    });
    let modules = adapters.collect::<Result<_, candle_core::Error>>()?;
    Ok(Adapters { config: config.clone(), modules })
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
        LoraConfig { rank: 8, alpha: 16.0, rslora: false, dropout: 0.0, targets }
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
        assert_eq!(plain.scale(), 1.0);
        assert_eq!(LoraConfig { rslora: true, ..plain }.scale(), 4.0);
    }
}
