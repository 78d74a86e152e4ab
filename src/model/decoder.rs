//! The decoder: embedding, layers, norm and head; one for every family, forward and backward by hand.
//!
//! Adapters are an argument: [`Adapter::On`] is the policy, [`Adapter::Reference`] what it is compared with, on the same
//! weights.

use candle_core::{DType, Device, Result, Tensor};

use super::config::{DecoderConfig, Rope};
use super::generate::Continued;
use super::layer::{At, Layer, LayerActivations, LayerCache, Pass, Rows};
use super::memory::Saved;
use super::packed::Packed;
use crate::adapter::{Adapters, Gradients};
use crate::ops::attention::{Segment, Segments};
use crate::ops::completion_logps::{self, TokenScore, Want};
use crate::ops::rope::Angles;
use crate::ops::{norm, rows};
use crate::quant::Weight;

/// Whose adapters are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// The base with its adapters: the policy.
    On,
    /// What the policy is compared with: the base alone, or with the adapter that training began from.
    Reference,
    /// The base alone.
    Off,
}

/// What a forward pass has to leave behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep<'a> {
    /// Scores only.
    Scores,
    /// What [`Decoder::backward`] needs; adapter inputs are dropped out under `dropout_key`.
    Activations {
        /// Names the update, with the run's seed in it.
        dropout_key: u64,
        /// What each layer keeps; what it does not keep is computed again.
        saved: &'a [Saved],
    },
}

/// A decoder's frozen weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) embedding: Weight,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    /// The embedding again where the head is tied; the same storage.
    pub(super) head: Weight,
    /// Of what flows through it. On a GPU norms' weights and rope's angles are wider.
    pub(super) dtype: DType,
}

/// What a forward pass over a packed batch gave.
#[derive(Debug)]
pub struct Forward {
    /// A score for each of the batch's `scored_rows`.
    pub scores: Vec<TokenScore>,
    /// Present where activations were kept.
    pub activations: Option<Activations>,
}

/// What [`Decoder::backward`] takes back.
#[derive(Debug)]
pub struct Activations {
    /// Of the lowest layer with an adapter and all above.
    layers: Vec<LayerActivations>,
    /// The last hidden states at the scored rows, `[S, D]`, and their norm's `ρ`.
    scored: Tensor,
    rho: Tensor,
    /// `U` of [`completion_logps`].
    slope: Tensor,
    rows: Rows,
    dropout_key: u64,
}

impl Decoder {
    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The matrix of module number `module` in the order of [`DecoderConfig::modules`].
    #[must_use]
    pub fn module(&self, module: usize) -> &Weight {
        let of_layer = self.config.projections().len();
        &self.layers[module / of_layer].projections[module % of_layer].weight
    }

    /// Element type of the computation.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.norm.device()
    }

    /// Scores the targets of a packed batch.
    ///
    /// # Errors
    /// A token outside the vocabulary, or what candle returns.
    pub fn forward(&self, batch: &Packed, adapters: Option<&Adapters>, keep: Keep<'_>) -> Result<Forward> {
        Ok(self.forward_beside(batch, adapters, keep, None)?.0)
    }

    /// [`Decoder::forward`], and where they are given the scores with other adapters. Both go through a layer before the
    /// next one, so a matrix that a GPU has in blocks is dequantized once for them.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`].
    pub(super) fn forward_beside(
        &self,
        batch: &Packed,
        adapters: Option<&Adapters>,
        keep: Keep<'_>,
        beside: Option<Option<&Adapters>>,
    ) -> Result<(Forward, Option<Vec<TokenScore>>)> {
        let (dropout_key, saved) = match keep {
            Keep::Scores => (None, &[][..]),
            Keep::Activations { dropout_key, saved } => (Some(dropout_key), saved),
        };
        if dropout_key.is_some() && saved.len() != self.layers.len() {
            candle_core::bail!("{} layers, and {} of them are told what to keep", self.layers.len(), saved.len())
        }
        let rows = self.rows(batch)?;
        let pass = Pass::new(adapters, &rows, dropout_key, &batch.row_keys);
        let beside = beside.map(|adapters| Pass::new(adapters, &rows, None, &batch.row_keys));
        let lowest = self.lowest_adapted(adapters);
        let mut x = self.embed(&batch.ids)?;
        let mut x_beside = beside.as_ref().map(|_| x.clone());
        let mut layers = Vec::new();
        for index in 0..self.layers.len() {
            if let (Some(pass), Some(x)) = (&beside, &mut x_beside) {
                *x = self.at(index, pass).forward(x.clone(), None)?.0;
            }
            let (y, activations) = self.at(index, &pass).forward(x, None)?;
            x = y;
            if let Some(&saved) = saved.get(index).filter(|_| index >= lowest) {
                layers.push(activations.only(saved));
            }
        }
        let score = |x: Tensor, want: Want| {
            let scored = rows::gather(&x, rows.scored(batch))?;
            drop(x);
            let (hidden, rho) = norm::forward(&scored, &self.norm, self.config.rms_norm_eps)?;
            let (scores, slope) = completion_logps::score(&hidden, self.head(), &batch.targets, want)?;
            Ok::<_, candle_core::Error>((scores, slope, scored, rho))
        };
        let of_beside = x_beside.map(|x| score(x, Want::Scores)).transpose()?.map(|(scores, ..)| scores);
        let want = if keep == Keep::Scores { Want::Scores } else { Want::Gradient };
        let (scores, slope, scored, rho) = score(x, want)?;
        let activations = slope.zip(dropout_key).map(|(slope, dropout_key)| Activations {
            layers,
            scored,
            rho,
            slope,
            rows,
            dropout_key,
        });
        Ok((Forward { scores, activations }, of_beside))
    }

    /// The last hidden states at the scored rows of a packed batch, normed: what the head makes logits of. `[S, D]`
    ///
    /// # Errors
    /// A token outside the vocabulary, or what candle returns.
    pub fn hidden(&self, batch: &Packed, adapters: Option<&Adapters>) -> Result<Tensor> {
        let rows = self.rows(batch)?;
        let pass = Pass::new(adapters, &rows, None, &batch.row_keys);
        let mut x = self.embed(&batch.ids)?;
        for index in 0..self.layers.len() {
            x = self.at(index, &pass).forward(x, None)?.0;
        }
        let scored = rows::gather(&x, rows.scored(batch))?;
        Ok(norm::forward(&scored, &self.norm, self.config.rms_norm_eps)?.0)
    }

    /// The same decoder with the updates in its matrices, which are dense then.
    ///
    /// # Errors
    /// What candle returns.
    pub fn merged(&self, adapters: &Adapters) -> Result<Self> {
        let mut merged = self.clone();
        let of_layer = self.config.projections().len();
        for (number, layer) in merged.layers.iter_mut().enumerate() {
            for (slot, linear) in layer.projections.iter_mut().enumerate() {
                if let Some(lora) = adapters.get(number * of_layer + slot) {
                    linear.weight = Weight::Dense(lora.merged(&linear.weight.dense(self.dtype())?)?);
                }
            }
        }
        Ok(merged)
    }

    /// The same decoder on a GPU, where it computes in `dtype`, bf16 or f32: embedding, head and as many layers as `resident` bytes take
    /// dequantized, the others in their blocks. On the CPU it stays as it is.
    ///
    /// # Errors
    /// What candle returns.
    #[cfg_attr(not(feature = "cuda"), expect(unused_mut, unused_variables, reason = "there is only the CPU"))]
    pub fn to_device(mut self, device: &Device, dtype: DType, resident: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            self.onto_gpu(device, dtype, resident)?;
        }
        Ok(self)
    }

    #[cfg(feature = "cuda")]
    fn onto_gpu(&mut self, device: &Device, dtype: DType, mut resident: usize) -> Result<()> {
        use crate::ops::cuda::weight::{Recent, Resident};
        let dense = |weight: &Weight| weight.dense(DType::F32)?.to_dtype(dtype)?.to_device(device).map(Weight::Dense);
        let vector = |tensor: &mut Tensor| {
            *tensor = tensor.to_dtype(DType::F32)?.to_device(device)?;
            Ok::<_, candle_core::Error>(())
        };
        let of_layer = self.config.layer_elements();
        let recent = Recent::new(of_layer);
        // from the last on: those are needed again first
        for layer in self.layers.iter_mut().rev() {
            let bytes = of_layer * dtype.size_in_bytes();
            let stays = bytes <= resident;
            let mut in_blocks = false;
            for linear in &mut layer.projections {
                linear.weight = match Resident::new(&linear.weight, device, &recent)? {
                    Some(blocks) if stays => {
                        in_blocks = true;
                        Weight::Dense(blocks.dense(dtype)?)
                    }
                    Some(blocks) => Weight::OnDevice(blocks),
                    None => dense(&linear.weight)?,
                };
                linear.bias.iter_mut().try_for_each(vector)?;
            }
            if in_blocks {
                resident -= bytes;
            }
            let norms = layer.head_norms.iter_mut().chain(&mut layer.post_norms).flatten();
            norms.chain([&mut layer.attention_norm, &mut layer.mlp_norm]).try_for_each(vector)?;
        }
        vector(&mut self.norm)?;
        self.embedding = dense(&self.embedding)?;
        self.head = if self.config.tie_word_embeddings { self.embedding.clone() } else { dense(&self.head)? };
        self.dtype = dtype;
        Ok(())
    }

    /// What makes logits of [`Decoder::hidden`].
    #[must_use]
    pub fn head(&self) -> completion_logps::Head<'_> {
        completion_logps::Head { weight: &self.head, softcap: self.config.logit_softcap }
    }

    /// Adds the gradients of the adapters to `gradients`.
    ///
    /// `slopes` has one number for each scored row: the derivative of the loss with respect to the sum of log-probs
    /// that the row belongs to. Activations are freed as they are used.
    ///
    /// # Errors
    /// What candle returns.
    pub fn backward(
        &self,
        batch: &Packed,
        adapters: &Adapters,
        activations: Activations,
        slopes: &[f64],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Activations { mut layers, scored, rho, slope, rows, dropout_key } = activations;
        let pass = Pass::new(Some(adapters), &rows, Some(dropout_key), &batch.row_keys);
        let d_hidden = completion_logps::backward(&slope, slopes)?;
        drop(slope);
        let d_scored = norm::backward(&d_hidden, &scored, &self.norm, &rho, None)?;
        let count = rows.last.as_ref().map_or(batch.ids.len(), |(last, _)| last.rows.len());
        let zeros = Tensor::zeros((count, self.config.hidden_size), self.dtype(), self.device())?;
        let mut dx = rows::scatter_add(&zeros, rows.scored(batch), &d_scored)?;
        drop((zeros, d_hidden, d_scored, scored));
        for index in (self.lowest_adapted(Some(adapters))..self.layers.len()).rev() {
            let Some(activations) = layers.pop() else { break };
            // below the lowest adapter nothing learns, so its layer's input needs no gradient
            let wanted = !layers.is_empty();
            match self.at(index, &pass).backward(dx, activations, wanted, gradients)? {
                Some(d) => dx = d,
                None => break,
            }
        }
        Ok(())
    }

    /// The lowest layer that has an adapter.
    fn lowest_adapted(&self, adapters: Option<&Adapters>) -> usize {
        let has_adapter = |module: &usize| adapters.is_some_and(|adapters| adapters.get(*module).is_some());
        let of_layer = self.config.projections().len();
        let modules = self.layers.len() * of_layer;
        (0..modules).find(has_adapter).map_or(self.layers.len(), |module| module / of_layer)
    }

    fn rows(&self, batch: &Packed) -> Result<Rows> {
        let angles = self.angles(&batch.positions, &batch.lengths())?;
        let last = batch.last_rows().map(|last| {
            let angles = angles.iter().map(|angles| angles.of_rows(&last.rows)).collect::<Result<_>>()?;
            Ok::<_, candle_core::Error>((last, angles))
        });
        Ok(Rows { segments: batch.segments.clone(), last: last.transpose()?, angles })
    }

    fn at<'a>(&'a self, index: usize, pass: &'a Pass<'a>) -> At<'a> {
        let last = pass.rows.last.as_ref().filter(|_| index + 1 == self.layers.len());
        At { config: &self.config, index, layer: &self.layers[index], pass, last }
    }

    pub(super) fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            candle_core::bail!("token {id} is outside the model's vocabulary of {}", self.config.vocab_size)
        }
        let embedded = self.embedding.gather(ids, self.dtype())?;
        if self.config.embedding_scale == 1.0 { Ok(embedded) } else { embedded * self.config.embedding_scale }
    }

    /// The logits after the last id of each sequence, whose new part the cache is extended by. `[N, V]`
    pub(super) fn step(
        &self,
        sequences: &[Continued<'_>],
        cache: &[LayerCache],
        adapters: Option<&Adapters>,
    ) -> Result<Tensor> {
        let (mut ids, mut positions, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut segments, mut places, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for &Continued { ids: all, filled, start } in sequences {
            let queries = ids.len()..ids.len() + all.len() - filled;
            ids.extend_from_slice(&all[filled..]);
            positions.extend((filled..all.len()).map(|p| p as u32));
            lengths.resize(ids.len(), all.len());
            last.push(ids.len() as u32 - 1);
            places.push((queries.clone(), start + filled));
            segments.push(vec![Segment { queries, prefix: 0..0, own: start..start + all.len() }]);
        }
        let angles = self.angles(&positions, &lengths)?;
        let rows = Rows { segments: Segments::new(segments), angles, last: None };
        let pass = Pass::new(adapters, &rows, None, &[]);
        let mut x = self.embed(&ids)?;
        for (index, cache) in cache.iter().enumerate() {
            x = self.at(index, &pass).forward(x, Some((cache, &places)))?.0;
        }
        let (hidden, _) = norm::forward(&rows::gather(&x, &last)?, &self.norm, self.config.rms_norm_eps)?;
        self.head().logits(&hidden)
    }

    /// The angles of rows at `positions` by each table; `lengths` are those of the sequences that the rows belong to.
    fn angles(&self, positions: &[u32], lengths: &[usize]) -> Result<Vec<Angles>> {
        let of = |rope: &Rope| {
            let frequencies = |row: usize| match &rope.long {
                Some((above, long)) if lengths[row] > *above => &long[..],
                _ => &rope.inverse_frequencies,
            };
            let dtype = if self.dtype == DType::BF16 { DType::F32 } else { self.dtype };
            Angles::new(frequencies, positions, rope.factor, dtype, self.device())
        };
        self.config.ropes.iter().map(of).collect()
    }
}
