//! The decoder: one for every family, forward and backward by hand.
//!
//! ```text
//! x ─ norm ─ q,k,v ─ rope ─ attention ─ o ─(+x)─ norm ─ gate,up ─ swiglu ─ down ─(+)─   × layers ─ norm ─ head
//! ```
//!
//! Adapters are an argument: [`Adapter::On`] is the policy, [`Adapter::Off`] the reference, on the same weights.

use candle_core::{DType, Device, Result, Tensor};

use super::packed::Packed;
use crate::adapter::{Adapters, Gradients};
use crate::ops::attention::{self, Heads, Segments};
use crate::ops::completion_logps::{self, TokenScore, Want};
use crate::ops::dropout::{self, Dropout};
use crate::ops::linear::{self, LowRank};
use crate::ops::rope::{self, Angles, Turn};
use crate::ops::{norm, swiglu};

/// Everything that shapes a decoder. A family's file makes it from the model's `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// `D`
    pub hidden_size: usize,
    /// `F`
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// `H`
    pub num_attention_heads: usize,
    /// `K`
    pub num_key_value_heads: usize,
    /// `E`
    pub head_dim: usize,
    /// `V`
    pub vocab_size: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Rope's inverse frequencies, scaling applied, `[E/2]`.
    pub inverse_frequencies: Vec<f32>,
    /// The head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v and o.
    pub attention_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
}

/// A linear module of a layer. The order is the order of modules everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// `self_attn.q_proj`
    Query,
    /// `self_attn.k_proj`
    Key,
    /// `self_attn.v_proj`
    Value,
    /// `self_attn.o_proj`
    Output,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Projection {
    /// All of a layer.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// The module's name within a layer, as Hugging Face has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// One linear module of the decoder: where it is and how large.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its path in Hugging Face's model, e.g. `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Columns of its weight.
    pub inputs: usize,
    /// Rows of its weight.
    pub outputs: usize,
}

impl DecoderConfig {
    /// `[outputs, inputs]` of a projection.
    #[must_use]
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        match projection {
            Projection::Query => (q, d),
            Projection::Key | Projection::Value => (kv, d),
            Projection::Output => (d, q),
            Projection::Gate | Projection::Up => (f, d),
            Projection::Down => (d, f),
        }
    }

    /// Every linear module that an adapter can sit on, in order: [`Projection::ALL`] of layer 0, of layer 1, ….
    #[must_use]
    pub fn modules(&self) -> Vec<Module> {
        let of_layer = |layer| {
            Projection::ALL.into_iter().map(move |projection| {
                let (outputs, inputs) = self.shape(projection);
                let path = format!("model.layers.{layer}.{}", projection.name());
                Module { path, inputs, outputs }
            })
        };
        (0..self.num_hidden_layers).flat_map(of_layer).collect()
    }

    /// Parameters of the base: what its files hold.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        let linears: usize = self.modules().iter().map(|m| m.inputs * m.outputs).sum();
        let biases: usize = Projection::ALL.map(|p| if self.has_bias(p) { self.shape(p).0 } else { 0 }).iter().sum();
        let norms = (2 * self.num_hidden_layers + 1) * self.hidden_size;
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        linears + biases * self.num_hidden_layers + norms + heads * self.vocab_size * self.hidden_size
    }

    pub(super) fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Query | Projection::Key | Projection::Value | Projection::Output => self.attention_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
        }
    }

    fn heads(&self) -> Heads {
        Heads {
            queries: self.num_attention_heads,
            keys: self.num_key_value_heads,
            dimension: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5),
        }
    }
}

/// Policy or reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// The base with its adapters: the policy.
    On,
    /// The base alone: the reference.
    Off,
}

/// What a forward pass has to leave behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// Scores only.
    Scores,
    /// What [`Decoder::backward`] needs; adapter inputs are dropped out under `dropout_key`.
    Activations {
        /// Names the update, with the run's seed in it.
        dropout_key: u64,
    },
}

/// A frozen matrix of the base.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    pub(super) mlp_norm: Tensor,
    /// In the order of [`Projection::ALL`].
    pub(super) projections: [Linear; 7],
}

/// A decoder's frozen weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    /// The embedding again where the head is tied; the same storage.
    pub(super) head: Tensor,
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
    layers: Vec<LayerActivations>,
    /// The last hidden states at the scored rows, `[S, D]`, and their norm's `ρ`.
    scored: Tensor,
    rho: Tensor,
    /// `U` of [`completion_logps`].
    slope: Tensor,
    angles: Angles,
    dropout_key: u64,
}

#[derive(Debug)]
struct LayerActivations {
    x: Tensor,
    attention_rho: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: attention::Saved,
    middle: Tensor,
    mlp_rho: Tensor,
    gate: Tensor,
    up: Tensor,
    /// `drop(x) Aᵀ` of each projection that has an adapter.
    low_rank: [Option<Tensor>; 7],
}

/// One forward or backward pass: which rows, which adapters, which dropout.
struct Pass<'a> {
    adapters: Option<&'a Adapters>,
    segments: &'a Segments,
    angles: &'a Angles,
    dropout_key: Option<u64>,
    row_keys: &'a [u64],
}

impl<'a> Pass<'a> {
    fn low_rank(&self, layer: usize, projection: Projection) -> Option<LowRank<'a>> {
        let adapters = self.adapters?;
        let module = layer * Projection::ALL.len() + projection as usize;
        let lora = adapters.get(module)?;
        let dropout = self.dropout_key.filter(|_| adapters.dropout() > 0.0).map(|key| Dropout {
            probability: adapters.dropout(),
            key: dropout::key(key, module as u64),
            rows: self.row_keys,
        });
        Some(LowRank { a: lora.a(), b: lora.b(), scale: lora.scale(), dropout })
    }
}

/// Keys and values of earlier positions of one layer.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

impl LayerCache {
    /// Writes `k, v [n, K·E]` after the first `filled` rows and returns all rows so far.
    fn append(&self, k: &Tensor, v: &Tensor, filled: usize) -> Result<(Tensor, Tensor)> {
        self.keys.slice_set(k, 0, filled)?;
        self.values.slice_set(v, 0, filled)?;
        let rows = filled + k.dims()[0];
        Ok((self.keys.narrow(0, 0, rows)?, self.values.narrow(0, 0, rows)?))
    }
}

impl Decoder {
    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Element type of the weights, which the computation is in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Scores the targets of a packed batch.
    ///
    /// # Errors
    /// A token outside the vocabulary, or what candle returns.
    pub fn forward(&self, batch: &Packed, adapters: Option<&Adapters>, keep: Keep) -> Result<Forward> {
        let dropout_key = match keep {
            Keep::Scores => None,
            Keep::Activations { dropout_key } => Some(dropout_key),
        };
        let angles = self.angles(&batch.positions)?;
        let (segments, row_keys) = (&batch.segments, &batch.row_keys);
        let pass = Pass { adapters, segments, angles: &angles, dropout_key, row_keys };
        let mut x = self.embed(&batch.ids)?;
        let mut layers = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let (y, activations) = self.layer(index, layer, x, None, &pass)?;
            x = y;
            if keep != Keep::Scores {
                layers.push(activations);
            }
        }
        let rows = Tensor::new(batch.scored_rows.as_slice(), self.device())?;
        let scored = x.index_select(&rows, 0)?;
        drop(x);
        let (hidden, rho) = norm::forward(&scored, &self.norm, self.config.rms_norm_eps)?;
        let want = if keep == Keep::Scores { Want::Scores } else { Want::Gradient };
        let (scores, slope) = completion_logps::score(&hidden, &self.head, &batch.targets, want)?;
        let activations = slope.zip(dropout_key).map(|(slope, dropout_key)| Activations {
            layers,
            scored,
            rho,
            slope,
            angles,
            dropout_key,
        });
        Ok(Forward { scores, activations })
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
        let Activations { mut layers, scored, rho, slope, angles, dropout_key } = activations;
        let pass = Pass {
            adapters: Some(adapters),
            segments: &batch.segments,
            angles: &angles,
            dropout_key: Some(dropout_key),
            row_keys: &batch.row_keys,
        };
        let slopes = Tensor::new(slopes, self.device())?.to_dtype(self.dtype())?.unsqueeze(1)?;
        let d_hidden = slope.broadcast_mul(&slopes)?;
        let d_scored = norm::backward(&d_hidden, &scored, &self.norm, &rho)?;
        let rows = Tensor::new(batch.scored_rows.as_slice(), self.device())?;
        let shape = (batch.ids.len(), self.config.hidden_size);
        let mut dx = Tensor::zeros(shape, self.dtype(), self.device())?.index_add(&rows, &d_scored, 0)?;
        while let Some(activations) = layers.pop() {
            let index = layers.len();
            dx = self.layer_backward(index, dx, activations, &pass, gradients)?;
        }
        Ok(())
    }

    pub(super) fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            candle_core::bail!("token {id} is outside the model's vocabulary of {}", self.config.vocab_size)
        }
        self.embedding.index_select(&Tensor::new(ids, self.device())?, 0)
    }

    /// The logits after the last of `ids`, which continue what `cache` holds of `filled` positions; the cache is
    /// extended by them. `[V]`
    pub(super) fn step(
        &self,
        ids: &[u32],
        filled: usize,
        cache: &[LayerCache],
        adapters: Option<&Adapters>,
    ) -> Result<Tensor> {
        let positions: Vec<u32> = (filled..filled + ids.len()).map(|p| p as u32).collect();
        let angles = self.angles(&positions)?;
        let segment = attention::Segment { queries: 0..ids.len(), prefix: 0..0, own: 0..filled + ids.len() };
        let segments = Segments::new(vec![vec![segment]]);
        let pass = Pass { adapters, segments: &segments, angles: &angles, dropout_key: None, row_keys: &[] };
        let mut x = self.embed(ids)?;
        for (index, (layer, cache)) in self.layers.iter().zip(cache).enumerate() {
            x = self.layer(index, layer, x, Some((cache, filled)), &pass)?.0;
        }
        let last = x.narrow(0, ids.len() - 1, 1)?.contiguous()?;
        let (hidden, _) = norm::forward(&last, &self.norm, self.config.rms_norm_eps)?;
        hidden.matmul(&self.head.t()?)?.squeeze(0)
    }

    fn angles(&self, positions: &[u32]) -> Result<Angles> {
        Angles::new(&self.config.inverse_frequencies, positions, self.dtype(), self.device())
    }

    fn layer(
        &self,
        index: usize,
        layer: &Layer,
        x: Tensor,
        cache: Option<(&LayerCache, usize)>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, LayerActivations)> {
        let epsilon = self.config.rms_norm_eps;
        let mut low_rank = [const { None }; 7];
        let mut project = |x: &Tensor, projection: Projection| {
            let linear = &layer.projections[projection as usize];
            let update = pass.low_rank(index, projection);
            let (y, xa) = linear::forward(x, &linear.weight, linear.bias.as_ref(), update.as_ref())?;
            low_rank[projection as usize] = xa;
            Ok::<_, candle_core::Error>(y)
        };
        let (normed, attention_rho) = norm::forward(&x, &layer.attention_norm, epsilon)?;
        let q = project(&normed, Projection::Query)?;
        let k = project(&normed, Projection::Key)?;
        let v = project(&normed, Projection::Value)?;
        drop(normed);
        let q = rope::turn(&q, pass.angles, Turn::Forward)?;
        let k = rope::turn(&k, pass.angles, Turn::Forward)?;
        let (k, v) = match cache {
            Some((cache, filled)) => cache.append(&k, &v, filled)?,
            None => (k, v),
        };
        let attention = attention::forward(&q, &k, &v, self.config.heads(), pass.segments)?;
        let middle = (&x + project(&attention.output, Projection::Output)?)?;
        let (normed, mlp_rho) = norm::forward(&middle, &layer.mlp_norm, epsilon)?;
        let gate = project(&normed, Projection::Gate)?;
        let up = project(&normed, Projection::Up)?;
        drop(normed);
        let h = swiglu::forward(&gate, &up)?;
        let y = (&middle + project(&h, Projection::Down)?)?;
        let kept = LayerActivations { x, attention_rho, q, k, v, attention, middle, mlp_rho, gate, up, low_rank };
        Ok((y, kept))
    }

    /// The gradient of a layer's input. Norms and the MLP's product are computed again from what was kept.
    fn layer_backward(
        &self,
        index: usize,
        dy: Tensor,
        kept: LayerActivations,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        let layer = &self.layers[index];
        let mut through = |dy: &Tensor, x: &Tensor, projection: Projection| {
            let update = pass.low_rank(index, projection);
            let xa = kept.low_rank[projection as usize].as_ref();
            let with = update.as_ref().zip(xa).map(|(update, xa)| (update, x, xa));
            let weight = &layer.projections[projection as usize].weight;
            let (dx, gradient) = linear::backward(dy, weight, with)?;
            if let Some(gradient) = gradient {
                gradients.add(index * Projection::ALL.len() + projection as usize, gradient)?;
            }
            Ok::<_, candle_core::Error>(dx)
        };
        let h = swiglu::forward(&kept.gate, &kept.up)?;
        let dh = through(&dy, &h, Projection::Down)?;
        drop(h);
        let (d_gate, d_up) = swiglu::backward(&dh, &kept.gate, &kept.up)?;
        drop(dh);
        let normed = norm::again(&kept.middle, &layer.mlp_norm, &kept.mlp_rho)?;
        let d_normed = (through(&d_gate, &normed, Projection::Gate)? + through(&d_up, &normed, Projection::Up)?)?;
        drop((normed, d_gate, d_up));
        let d_middle = (dy + norm::backward(&d_normed, &kept.middle, &layer.mlp_norm, &kept.mlp_rho)?)?;

        let d_output = through(&d_middle, &kept.attention.output, Projection::Output)?;
        let heads = self.config.heads();
        let (dq, dk, dv) =
            attention::backward(&d_output, &kept.q, &kept.k, &kept.v, &kept.attention, heads, pass.segments)?;
        let dq = rope::turn(&dq, pass.angles, Turn::Backward)?;
        let dk = rope::turn(&dk, pass.angles, Turn::Backward)?;
        let normed = norm::again(&kept.x, &layer.attention_norm, &kept.attention_rho)?;
        let d_normed = (through(&dq, &normed, Projection::Query)?
            + through(&dk, &normed, Projection::Key)?
            + through(&dv, &normed, Projection::Value)?)?;
        d_middle + norm::backward(&d_normed, &kept.x, &layer.attention_norm, &kept.attention_rho)?
    }
}
