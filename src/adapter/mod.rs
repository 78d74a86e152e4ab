//! LoRA adapters: which modules carry one, their matrices, and their files.
//!
//! The layer itself is ours: `candle-lora` is not on the registry, scales the base output together with the update,
//! and names tensors in a way PEFT cannot read.

mod algebra;
mod config;
mod init;
pub mod peft;
mod svd;
mod targets;

use candle_core::{Device, Result, Tensor};

pub use algebra::Truncation;
pub use config::{AdapterConfig, AdapterError, InitMode, InitialWeights, LoraConfig};
pub use init::new;
pub use targets::Targets;

use crate::model::Decoder;
use crate::ops::linear::{self, LowRank, LowRankGradient, Magnitude};

/// One module's update `scale · B A`.
///
/// What is trained may stand on an update that is not: of an adapter below it, or of minus its own first value, so that
/// `A` and `B` can begin elsewhere than at zero while the base stays what it is.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Path of the module it sits on, e.g. `model.layers.0.self_attn.q_proj`.
    module: String,
    /// What is trained, `A [r, in]` and `B [out, r]`.
    own: [Tensor; 2],
    /// What is not, at the same scale.
    frozen: Option<[Tensor; 2]>,
    /// Both: `A` one below the other, `B` side by side.
    whole: [Tensor; 2],
    scale: f64,
    dora: Option<Dora>,
}

/// A trained length for each row of the matrix (DoRA, Liu et al. 2024, <https://arxiv.org/abs/2402.09353>):
/// `y = m / ‖W + s B A‖ · (W + s B A) x`, the norm taken of each row and held constant in the gradient.
#[derive(Debug, Clone)]
struct Dora {
    /// `m [out]`
    magnitude: Tensor,
    /// Known once the adapter has met its base.
    norms: Option<Norms>,
}

#[derive(Debug, Clone)]
struct Norms {
    /// `‖W‖²` of each row of the base.
    base: Tensor,
    /// `‖W + s B A‖` of each row, as `B` and `A` are now.
    whole: Tensor,
}

impl Lora {
    fn new(module: &str, a: Tensor, b: Tensor, scale: f64) -> Self {
        let whole = [a.clone(), b.clone()];
        Self { module: module.to_owned(), own: [a, b], frozen: None, whole, scale, dora: None }
    }

    /// The same on top of an update that is not trained, `scale · frozen_b frozen_a`.
    fn on(mut self, frozen: [Tensor; 2]) -> Result<Self> {
        self.frozen = Some(frozen);
        self.join()?;
        Ok(self)
    }

    fn join(&mut self) -> Result<()> {
        let [a, b] = &self.own;
        self.whole = match &self.frozen {
            None => [a.clone(), b.clone()],
            Some([frozen_a, frozen_b]) => [Tensor::cat(&[a, frozen_a], 0)?, Tensor::cat(&[b, frozen_b], 1)?],
        };
        Ok(())
    }

    /// The module's path in Hugging Face's model.
    #[must_use]
    pub fn module(&self) -> &str {
        &self.module
    }

    /// `A [R, in]`, of all of the update.
    #[must_use]
    pub fn a(&self) -> &Tensor {
        &self.whole[0]
    }

    /// `B [out, R]`, of all of the update.
    #[must_use]
    pub fn b(&self) -> &Tensor {
        &self.whole[1]
    }

    /// `R`
    #[must_use]
    pub fn rank(&self) -> usize {
        self.whole[0].dims()[0]
    }

    /// What `B A` is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// DoRA's `m [out]`.
    #[must_use]
    pub fn magnitude(&self) -> Option<&Tensor> {
        self.dora.as_ref().map(|dora| &dora.magnitude)
    }

    /// The module's matrix `[out, in]` with the update: `W + s B A`, its rows brought to DoRA's lengths.
    ///
    /// # Errors
    /// What candle returns.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let merged = (weight + (self.b().matmul(self.a())? * self.scale)?)?;
        let Some(magnitude) = self.magnitude() else { return Ok(merged) };
        let norms = merged.sqr()?.sum_keepdim(1)?.sqrt()?;
        merged.broadcast_mul(&(magnitude.unsqueeze(1)? / norms)?)
    }

    /// For a product with the module's matrix.
    pub(crate) fn low_rank(&self) -> LowRank<'_> {
        let magnitude = self.dora.as_ref().and_then(|Dora { magnitude, norms }| {
            norms.as_ref().map(|norms| Magnitude { length: magnitude, norm: &norms.whole })
        });
        LowRank { a: self.a(), b: self.b(), scale: self.scale, dropout: None, magnitude }
    }

    /// Trainable tensors, with the end of their names.
    fn own(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let [a, b] = &self.own;
        let magnitude = self.magnitude().map(|magnitude| ("lora_magnitude_vector", magnitude));
        [("lora_A", a), ("lora_B", b)].into_iter().chain(magnitude)
    }

    fn moved(mut self, device: &Device) -> Result<Self> {
        let to = |tensor: &mut Tensor| {
            *tensor = tensor.to_device(device)?;
            Ok::<_, candle_core::Error>(())
        };
        self.own.iter_mut().chain(self.frozen.iter_mut().flatten()).try_for_each(to)?;
        if let Some(Dora { magnitude, norms }) = &mut self.dora {
            to(magnitude)?;
            norms.iter_mut().flat_map(|Norms { base, whole }| [base, whole]).try_for_each(to)?;
        }
        self.join()?;
        Ok(self)
    }

    /// Takes the lengths of the rows of the module's matrix with the update, for DoRA.
    fn measure(&mut self, decoder: &Decoder, module: usize) -> Result<()> {
        let Some(Dora { norms, .. }) = &self.dora else { return Ok(()) };
        let weight = decoder.module(module);
        let base = match norms {
            Some(Norms { base, .. }) => base.clone(),
            None => weight.row_norms_squared(self.b().dtype())?,
        };
        // ‖w + s Aᵀb‖² = ‖w‖² + 2 s (A w)·b + s² b·(A Aᵀ b), with one product of W
        let (a, b) = (self.a(), self.b());
        // the base may compute in narrower numbers
        let across = linear::apply(&a.to_dtype(decoder.dtype())?, weight)?.to_dtype(a.dtype())?.t()?;
        let inner = (across * (2.0 * self.scale))?;
        let own = (b.matmul(&a.matmul(&a.t()?)?)? * (self.scale * self.scale))?;
        let whole = (&base + ((inner + own)? * b)?.sum(1)?)?.relu()?.sqrt()?;
        if let Some(dora) = &mut self.dora {
            dora.norms = Some(Norms { base, whole });
        }
        Ok(())
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

    /// The trainable tensors by name, in order: `<module>.lora_A`, `<module>.lora_B` and, of DoRA,
    /// `<module>.lora_magnitude_vector` of each module.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.iter().flat_map(|lora| lora.own().map(|(name, tensor)| (format!("{}.{name}", lora.module), tensor)))
    }

    /// Replaces the trainable tensors, in order.
    ///
    /// # Errors
    /// What candle returns.
    ///
    /// # Panics
    /// Where `tensors` has another number of tensors or another shape: they come from [`Adapters::tensors`].
    pub fn replace(&mut self, tensors: impl IntoIterator<Item = Tensor>) -> Result<()> {
        let mut tensors = tensors.into_iter();
        for lora in self.modules.iter_mut().flatten() {
            for tensor in lora.own.iter_mut().chain(lora.dora.as_mut().map(|dora| &mut dora.magnitude)) {
                let new = tensors.next().expect("a tensor for each trainable tensor");
                assert_eq!(new.dims(), tensor.dims(), "a trainable tensor keeps its shape");
                *tensor = new;
            }
            lora.join()?;
        }
        assert!(tensors.next().is_none(), "no tensor is left over");
        Ok(())
    }

    /// Takes the lengths of the rows that DoRA divides by; after every change of the tensors.
    ///
    /// # Errors
    /// What candle returns.
    pub fn measure(&mut self, decoder: &Decoder) -> Result<()> {
        for (module, lora) in self.modules.iter_mut().enumerate() {
            if let Some(lora) = lora {
                lora.measure(decoder, module)?;
            }
        }
        Ok(())
    }

    /// The same adapters on `device`.
    ///
    /// # Errors
    /// What candle returns.
    pub fn to_device(mut self, device: &Device) -> Result<Self> {
        for module in &mut self.modules {
            *module = module.take().map(|lora| lora.moved(device)).transpose()?;
        }
        Ok(self)
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.elem_count()).sum()
    }

    /// Whether they change nothing: every `B` is zero, so that on and off are the same function. Not known of DoRA's
    /// lengths, nor where something is not trained.
    ///
    /// # Errors
    /// What candle returns.
    pub fn is_zero(&self) -> Result<bool> {
        for lora in self.iter() {
            if lora.frozen.is_some() || lora.dora.is_some() || largest(lora.b())? != 0.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether they compute what `other` does: the same tensors on the same modules.
    ///
    /// # Errors
    /// What candle returns.
    pub fn same(&self, other: &Self) -> Result<bool> {
        if !self.modules.iter().map(Option::is_some).eq(other.modules.iter().map(Option::is_some)) {
            return Ok(false);
        }
        for (one, two) in self.iter().zip(other.iter()) {
            let tensors = |lora: &Lora| lora.whole.iter().chain(lora.magnitude()).cloned().collect::<Vec<_>>();
            let (one, two, scales) = (tensors(one), tensors(two), one.scale == two.scale);
            if !scales || one.len() != two.len() {
                return Ok(false);
            }
            for (one, two) in one.iter().zip(&two) {
                if one.dims() != two.dims() || largest(&(one - two)?)? != 0.0 {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What an adapter is, under a hash: all that [`Adapters::same`] compares.
    ///
    /// # Errors
    /// What candle returns.
    pub fn fingerprint(&self) -> std::result::Result<String, AdapterError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(peft::config_json(self, "").as_bytes()).update(&peft::tensor_bytes(self)?);
        Ok(hasher.finalize().to_string())
    }
}

fn largest(tensor: &Tensor) -> Result<f64> {
    tensor.abs()?.flatten_all()?.max(0)?.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()
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
            Some(sum) => LowRankGradient {
                a: (sum.a + gradient.a)?,
                b: (sum.b + gradient.b)?,
                magnitude: sum.magnitude.zip(gradient.magnitude).map(|(one, two)| one + two).transpose()?,
            },
        });
        Ok(())
    }

    /// The gradients of the trainable tensors, in the order of [`Adapters::tensors`].
    ///
    /// # Errors
    /// What candle returns, or a trainable tensor got no gradient: it would silently never train.
    pub fn in_order(self, adapters: &Adapters) -> std::result::Result<Vec<Tensor>, AdapterError> {
        let mut modules = self.modules.into_iter().chain(std::iter::repeat_with(|| None));
        let mut ordered = Vec::new();
        for (lora, gradient) in adapters.modules.iter().zip(&mut modules) {
            let Some(lora) = lora else { continue };
            let Some(LowRankGradient { a, b, magnitude }) = gradient else {
                return Err(AdapterError::NoGradient { module: lora.module.clone() });
            };
            let rank = lora.own[0].dims()[0];
            match lora.frozen {
                None => ordered.extend([a, b]),
                Some(_) => ordered.extend([a.narrow(0, 0, rank)?.contiguous()?, b.narrow(1, 0, rank)?.contiguous()?]),
            }
            ordered.extend(magnitude);
        }
        Ok(ordered)
    }
}
