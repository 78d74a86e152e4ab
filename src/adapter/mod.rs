//! LoRA adapters: which modules carry one, their matrices, and their files.
//!
//! The layer itself is ours: `candle-lora` is not on the registry, scales the base output together with the update,
//! and names tensors in a way PEFT cannot read.

mod config;
mod init;
pub mod peft;
mod targets;

use candle_core::{DType, Result, Tensor};

pub use config::{AdapterConfig, AdapterError, LoraConfig};
pub use init::new;
pub use targets::Targets;

use crate::ops::linear::LowRankGradient;

/// One module's update `scale · B A`.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Path of the module it sits on, e.g. `model.layers.0.self_attn.q_proj`.
    module: String,
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Lora {
    /// The module's path in Hugging Face's model.
    #[must_use]
    pub fn module(&self) -> &str {
        &self.module
    }

    /// `A [R, in]`
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// `B [out, R]`
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// What `B A` is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }
}

/// A model's adapters, by module in the order of [`DecoderConfig::modules`](crate::model::DecoderConfig::modules).
///
/// This order is the one order of trainable tensors: the optimizer, checkpoints and files all go by it, `A` before `B`.
#[derive(Debug, Clone)]
pub struct Adapters {
    config: LoraConfig,
    modules: Vec<Option<Lora>>,
}

impl Adapters {
    /// The adapter on module number `module`, if it has one.
    #[must_use]
    pub fn get(&self, module: usize) -> Option<&Lora> {
        self.modules[module].as_ref()
    }

    /// All adapters, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Lora> {
        self.modules.iter().flatten()
    }

    /// Rank, alpha and where they sit.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Dropout on the adapters' input while training.
    #[must_use]
    pub fn dropout(&self) -> f64 {
        self.config.dropout
    }

    /// The same adapters with another dropout.
    #[must_use]
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.config.dropout = dropout;
        self
    }

    /// The trainable tensors by name, in order: `<module>.lora_A`, `<module>.lora_B` of each module.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.iter().flat_map(|lora| {
            let name = |side| format!("{}.lora_{side}", lora.module);
            [(name("A"), &lora.a), (name("B"), &lora.b)]
        })
    }

    /// Replaces the trainable tensors, in order.
    ///
    /// # Panics
    /// Where `tensors` has another number of tensors or another shape: they come from [`Adapters::tensors`].
    pub fn replace(&mut self, tensors: impl IntoIterator<Item = Tensor>) {
        let mut tensors = tensors.into_iter();
        for lora in self.modules.iter_mut().flatten() {
            for tensor in [&mut lora.a, &mut lora.b] {
                let new = tensors.next().expect("a tensor for each trainable tensor");
                assert_eq!(new.dims(), tensor.dims(), "a trainable tensor keeps its shape");
                *tensor = new;
            }
        }
        assert!(tensors.next().is_none(), "no tensor is left over");
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.elem_count()).sum()
    }

    /// Whether every `B` is zero, so that on and off are the same function.
    ///
    /// # Errors
    /// What candle returns.
    pub fn is_zero(&self) -> Result<bool> {
        for lora in self.iter() {
            if lora.b.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()? != 0.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Gradients of the adapters, added up over the micro-batches of an update.
#[derive(Debug, Default)]
pub struct Gradients {
    modules: Vec<Option<LowRankGradient>>,
}

impl Gradients {
    /// Adds the gradient of module number `module`.
    ///
    /// # Errors
    /// What candle returns.
    pub fn add(&mut self, module: usize, gradient: LowRankGradient) -> Result<()> {
        if self.modules.len() <= module {
            self.modules.resize_with(module + 1, || None);
        }
        self.modules[module] = Some(match self.modules[module].take() {
            None => gradient,
            Some(sum) => LowRankGradient { a: (sum.a + gradient.a)?, b: (sum.b + gradient.b)? },
        });
        Ok(())
    }

    /// The gradients of the trainable tensors, in the order of [`Adapters::tensors`].
    ///
    /// # Errors
    /// The name of a trainable tensor that got no gradient: it would silently never train.
    pub fn in_order(self, adapters: &Adapters) -> std::result::Result<Vec<Tensor>, String> {
        let mut modules = self.modules.into_iter().chain(std::iter::repeat_with(|| None));
        let mut ordered = Vec::new();
        for (lora, gradient) in adapters.modules.iter().zip(&mut modules) {
            match (lora, gradient) {
                (Some(_), Some(gradient)) => ordered.extend([gradient.a, gradient.b]),
                (Some(lora), None) => return Err(lora.module.clone()),
                (None, _) => {}
            }
        }
        Ok(ordered)
    }
}
