//! AdamW, as `torch.optim.AdamW` computes it.

use candle_core::{DType, Device, Result, Tensor};

use crate::adapter::Adapters;
#[cfg(feature = "cuda")]
use crate::ops::cuda::adamw as cuda;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// Decoupled weight decay (Loshchilov & Hutter 2019, <https://arxiv.org/abs/1711.05101>), with β₁ = 0.9, β₂ = 0.999
/// and ε = 1e-8:
///
/// ```text
/// p ← p − lr·wd·p          m ← β₁m + (1 − β₁)g          v ← β₂v + (1 − β₂)g²
/// p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
/// ```
#[derive(Debug, Clone)]
pub struct AdamW {
    moments: Vec<Moments>,
    steps: u32,
    /// On a GPU, the buffers that all moments are parts of, once there was a step.
    #[cfg(feature = "cuda")]
    flat: Option<[Tensor; 2]>,
}

/// Of one tensor: the running means of its gradient and of the gradient's square.
#[derive(Debug, Clone)]
pub struct Moments {
    /// `m`
    pub first: Tensor,
    /// `v`
    pub second: Tensor,
}

impl AdamW {
    /// Moments of zero for every trainable tensor.
    ///
    /// # Errors
    /// What candle returns.
    pub fn new(adapters: &Adapters) -> Result<Self> {
        let zero =
            |(_, tensor): (_, &Tensor)| Ok(Moments { first: tensor.zeros_like()?, second: tensor.zeros_like()? });
        Ok(Self::resume(adapters.tensors().map(zero).collect::<Result<_>>()?, 0))
    }

    /// Goes on with moments that were saved after `steps` updates.
    #[must_use]
    pub fn resume(moments: Vec<Moments>, steps: u32) -> Self {
        Self {
            moments,
            steps,
            #[cfg(feature = "cuda")]
            flat: None,
        }
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// What candle returns.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        let to = |Moments { first, second }: &Moments| {
            Ok(Moments { first: first.to_device(device)?, second: second.to_device(device)? })
        };
        Ok(Self::resume(self.moments.iter().map(to).collect::<Result<_>>()?, self.steps))
    }

    /// The moments, in the order of [`Adapters::tensors`].
    #[must_use]
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The trainable tensors after an update by their gradients, which are in the order of [`Adapters::tensors`].
    ///
    /// The learning rate of all but `A` is `loraplus_ratio` times as high (LoRA+, Hayou et al. 2024,
    /// <https://arxiv.org/abs/2402.12354>).
    ///
    /// # Errors
    /// What candle returns.
    pub fn step(&mut self, adapters: &Adapters, gradients: &[Tensor], rate: Rate) -> Result<Vec<Tensor>> {
        self.steps += 1;
        let steps = f64::from(self.steps);
        let correction = (1.0 - BETA2.powf(steps)).sqrt();
        #[cfg(feature = "cuda")]
        if gradients.iter().all(|gradient| gradient.device().is_cuda()) {
            return self.step_flat(adapters, gradients, rate, correction);
        }
        let mut updated = Vec::with_capacity(gradients.len());
        for (((name, tensor), gradient), moments) in adapters.tensors().zip(gradients).zip(&mut self.moments) {
            moments.first = ((&moments.first * BETA1)? + (gradient * (1.0 - BETA1))?)?;
            moments.second = ((&moments.second * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
            let learning_rate =
                rate.learning_rate * if name.ends_with(".lora_A") { 1.0 } else { rate.loraplus_ratio };
            let size = learning_rate / (1.0 - BETA1.powf(steps));
            let denominator = ((moments.second.sqrt()? / correction)? + EPSILON)?;
            let decayed = (tensor * (1.0 - learning_rate * rate.weight_decay))?;
            updated.push((decayed - ((&moments.first / denominator)? * size)?)?);
        }
        Ok(updated)
    }
}

#[cfg(feature = "cuda")]
impl AdamW {
    /// All tensors in one launch: those of `A` first, which have a learning rate of their own.
    fn step_flat(
        &mut self,
        adapters: &Adapters,
        gradients: &[Tensor],
        rate: Rate,
        correction: f64,
    ) -> Result<Vec<Tensor>> {
        let (names, tensors): (Vec<String>, Vec<&Tensor>) = adapters.tensors().unzip();
        let (mut order, others): (Vec<usize>, Vec<usize>) =
            (0..tensors.len()).partition(|&i| names[i].ends_with(".lora_A"));
        let split = order.iter().map(|&i| tensors[i].elem_count()).sum();
        order.extend(others);
        let flat = |of: &dyn Fn(usize) -> Tensor| {
            let ordered: Vec<Tensor> = order.iter().map(|&i| of(i)).collect();
            cuda::flat(&ordered)
        };
        // where each tensor begins
        let mut starts = vec![0; tensors.len()];
        let mut end = 0;
        for &i in &order {
            starts[i] = end;
            end += tensors[i].elem_count();
        }
        let part =
            |flat: &Tensor, i: usize| flat.narrow(0, starts[i], tensors[i].elem_count())?.reshape(tensors[i].shape());
        let moments = match self.flat.take() {
            Some(flat) => flat,
            None => {
                let both = [flat(&|i| self.moments[i].first.clone())?, flat(&|i| self.moments[i].second.clone())?];
                let parts = |i| Ok(Moments { first: part(&both[0], i)?, second: part(&both[1], i)? });
                self.moments = (0..tensors.len()).map(parts).collect::<Result<_>>()?;
                both
            }
        };
        let Rate { learning_rate, loraplus_ratio, weight_decay } = rate;
        let rates = [learning_rate, learning_rate * loraplus_ratio];
        let factors = cuda::Factors {
            decay: rates.map(|rate| 1.0 - rate * weight_decay),
            size: rates.map(|rate| rate / (1.0 - BETA1.powf(f64::from(self.steps)))),
            betas: [BETA1, BETA2],
            correction,
            epsilon: EPSILON,
        };
        let (p, g) = (flat(&|i| tensors[i].clone())?, flat(&|i| gradients[i].clone())?);
        let updated = cuda::step(&p, &g, moments.each_ref(), split, factors)?;
        self.flat = Some(moments);
        (0..tensors.len()).map(|i| part(&updated, i)).collect()
    }
}

/// How far an update goes.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Of `A`, and of all where the ratio is 1.
    pub learning_rate: f64,
    /// How many times higher that of `B` is, and of DoRA's lengths.
    pub loraplus_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Scales all gradients together so that their common L2 norm is at most `max_norm`, and returns the norm before.
///
/// As `torch.nn.utils.clip_grad_norm_`: by `max_norm / (norm + 1e-6)` where that is below one.
///
/// # Errors
/// What candle returns.
pub fn clip(gradients: &mut [Tensor], max_norm: f64) -> Result<f64> {
    let norm = norm(gradients)?;
    let scale = max_norm / (norm + 1e-6);
    if scale < 1.0 {
        for gradient in gradients {
            *gradient = (&*gradient * scale)?;
        }
    }
    Ok(norm)
}

/// The common L2 norm of `gradients`, summed in f64.
///
/// # Errors
/// What candle returns.
pub fn norm(gradients: &[Tensor]) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if !gradients.is_empty() && gradients.iter().all(|gradient| gradient.device().is_cuda()) {
        return Ok(cuda::square_sum(&cuda::flat(gradients)?)?.sqrt());
    }
    let mut sum = 0.0;
    for gradient in gradients {
        sum += gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_all_together_and_leaves_small_ones() {
        let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).expect("made");
        let mut gradients = vec![tensor(&[3.0]), tensor(&[0.0, 4.0])];
        assert_eq!(clip(&mut gradients, 10.0).expect("clipped"), 5.0);
        assert_eq!(gradients[1].to_vec1::<f64>().expect("f64"), [0.0, 4.0]);
        assert_eq!(clip(&mut gradients, 1.0).expect("clipped"), 5.0);
        // 1 / (5 + 1e-6), as torch has it
        assert!((gradients[0].to_vec1::<f64>().expect("f64")[0] - 3.0 / (5.0 + 1e-6)).abs() < 1e-15);
    }
}
