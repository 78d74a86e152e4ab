//! The decoder: one for every family, forward and backward by hand.
//!
//! ```text
//! x ─ norm ─ q,k,v ─ rope ─ attention ─ o ─(+x)─ norm ─ gate,up ─ swiglu ─ down ─(+)─   × layers ─ norm ─ head
//! ```
//!
//! Adapters are an argument: [`Adapter::On`] is the policy, [`Adapter::Off`] the reference, on the same weights.

use candle_core::{DType, Device, Result, Tensor};

use super::memory::Saved;
use super::packed::{LastRows, Packed};
use crate::adapter::{Adapters, Gradients};
use crate::ops::attention::{self, Heads, Segments};
use crate::ops::completion_logps::{self, TokenScore, Want};
use crate::ops::dropout::{self, Dropout};
use crate::ops::linear::{self, Branch, LowRank, LowRankGradient};
use crate::ops::rope::{self, Angles, Turn};
use crate::ops::{norm, rows, swiglu};

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

/// What a layer keeps, by its [`Saved`].
#[derive(Debug)]
struct LayerActivations {
    x: Tensor,
    projected: Option<Projected>,
    attention: Option<attention::Saved>,
    middle: Option<Middle>,
    mlp: Option<Mlp>,
}

/// Queries, keys and values. `inner` is `drop(x) Aᵀ` of the projections that have an adapter.
#[derive(Debug)]
struct Projected {
    rho: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Of all three, or of key and value where the last layer has fewer queries.
    inner: Option<Tensor>,
    query_inner: Option<Tensor>,
}

/// The residual stream between attention and MLP.
#[derive(Debug)]
struct Middle {
    x: Tensor,
    rho: Tensor,
    inner: Option<Tensor>,
}

#[derive(Debug)]
struct Mlp {
    gate: Tensor,
    up: Tensor,
    inner: Option<Tensor>,
}

/// Which rows attend to which, and where they stand; made once a batch and used in every layer.
#[derive(Debug)]
struct Rows {
    segments: Segments,
    angles: Angles,
    /// What is different in the last layer.
    last: Option<(LastRows, Angles)>,
}

/// One forward or backward pass: which adapters, which dropout.
struct Pass<'a> {
    adapters: Option<&'a Adapters>,
    rows: &'a Rows,
    dropout_key: Option<u64>,
    row_keys: &'a [u64],
    last_row_keys: Vec<u64>,
}

impl<'a> Pass<'a> {
    fn new(adapters: Option<&'a Adapters>, rows: &'a Rows, dropout_key: Option<u64>, row_keys: &'a [u64]) -> Self {
        let last = rows.last.iter().flat_map(|(last, _)| &last.rows);
        let last_row_keys = match row_keys {
            [] => Vec::new(),
            keys => last.map(|&row| keys[row as usize]).collect(),
        };
        Self { adapters, rows, dropout_key, row_keys, last_row_keys }
    }
}

/// A layer within a pass.
struct At<'a> {
    config: &'a DecoderConfig,
    index: usize,
    layer: &'a Layer,
    pass: &'a Pass<'a>,
    /// Set in the last layer, where not every row goes on.
    last: Option<&'a (LastRows, Angles)>,
}

impl<'a> At<'a> {
    fn module(&self, projection: Projection) -> usize {
        self.index * Projection::ALL.len() + projection as usize
    }

    /// A projection of all rows.
    fn branch(&self, projection: Projection) -> Branch<'a> {
        self.branch_of(projection, self.pass.row_keys)
    }

    /// A projection of the rows that go on past the keys and values.
    fn kept_branch(&self, projection: Projection) -> Branch<'a> {
        self.branch_of(projection, if self.last.is_some() { &self.pass.last_row_keys } else { self.pass.row_keys })
    }

    fn branch_of(&self, projection: Projection, row_keys: &'a [u64]) -> Branch<'a> {
        let Linear { weight, bias } = &self.layer.projections[projection as usize];
        let module = self.module(projection);
        let adapter = |adapters: &'a Adapters| {
            let lora = adapters.get(module)?;
            let dropout = self.pass.dropout_key.filter(|_| adapters.dropout() > 0.0).map(|key| Dropout {
                probability: adapters.dropout(),
                key: dropout::key(key, module as u64),
                rows: row_keys,
            });
            Some(LowRank { a: lora.a(), b: lora.b(), scale: lora.scale(), dropout })
        };
        Branch { weight, bias: bias.as_ref(), update: self.pass.adapters.and_then(adapter) }
    }

    /// Those of the rows of `x` that go on.
    fn kept(&self, x: &Tensor) -> Result<Tensor> {
        match self.last {
            Some((last, _)) => rows::gather(x, &last.rows),
            None => Ok(x.clone()),
        }
    }

    fn query_angles(&self) -> &'a Angles {
        self.last.map_or(&self.pass.rows.angles, |(_, angles)| angles)
    }

    fn segments(&self) -> &'a Segments {
        self.last.map_or(&self.pass.rows.segments, |(last, _)| &last.segments)
    }

    /// norm, q, k, v, rope
    fn project(&self, x: &Tensor) -> Result<Projected> {
        let (normed, rho) = norm::forward(x, &self.layer.attention_norm, self.config.rms_norm_eps)?;
        let [query, key, value] = [Projection::Query, Projection::Key, Projection::Value];
        let (q, k, v, inner, query_inner) = if self.last.is_some() {
            let ([k, v], inner) = linear::forward(&normed, &[self.branch(key), self.branch(value)], None)?;
            let ([q], query_inner) = linear::forward(&self.kept(&normed)?, &[self.kept_branch(query)], None)?;
            (q, k, v, inner, query_inner)
        } else {
            let branches = [self.branch(query), self.branch(key), self.branch(value)];
            let ([q, k, v], inner) = linear::forward(&normed, &branches, None)?;
            (q, k, v, inner, None)
        };
        let q = rope::turn(&q, self.query_angles(), Turn::Forward)?;
        let k = rope::turn(&k, &self.pass.rows.angles, Turn::Forward)?;
        Ok(Projected { rho, q, k, v, inner, query_inner })
    }

    fn attend(&self, Projected { q, k, v, .. }: &Projected) -> Result<attention::Saved> {
        attention::forward(q, k, v, self.config.heads(), self.segments())
    }

    /// o, the residual, and the scale of the norm that follows
    fn middle(&self, x: &Tensor, attention: &attention::Saved) -> Result<(Middle, Tensor)> {
        let branch = [self.kept_branch(Projection::Output)];
        let ([x], inner) = linear::forward(&attention.output, &branch, Some(&self.kept(x)?))?;
        let (normed, rho) = norm::forward(&x, &self.layer.mlp_norm, self.config.rms_norm_eps)?;
        Ok((Middle { x, rho, inner }, normed))
    }

    /// gate and up
    fn mlp(&self, normed: &Tensor) -> Result<Mlp> {
        let branches = [self.kept_branch(Projection::Gate), self.kept_branch(Projection::Up)];
        let ([gate, up], inner) = linear::forward(normed, &branches, None)?;
        Ok(Mlp { gate, up, inner })
    }

    /// swiglu, down and the residual
    fn finish(&self, middle: &Middle, mlp: &Mlp) -> Result<Tensor> {
        let h = swiglu::forward(&mlp.gate, &mlp.up)?;
        let ([y], _) = linear::forward(&h, &[self.kept_branch(Projection::Down)], Some(&middle.x))?;
        Ok(y)
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
    pub fn forward(&self, batch: &Packed, adapters: Option<&Adapters>, keep: Keep<'_>) -> Result<Forward> {
        let (dropout_key, saved) = match keep {
            Keep::Scores => (None, &[][..]),
            Keep::Activations { dropout_key, saved } => (Some(dropout_key), saved),
        };
        if dropout_key.is_some() && saved.len() != self.layers.len() {
            candle_core::bail!("{} layers, and {} of them are told what to keep", self.layers.len(), saved.len())
        }
        let rows = self.rows(batch)?;
        let pass = Pass::new(adapters, &rows, dropout_key, &batch.row_keys);
        let lowest = self.lowest_adapted(adapters);
        let mut x = self.embed(&batch.ids)?;
        let mut layers = Vec::new();
        for index in 0..self.layers.len() {
            let (y, activations) = self.layer(&self.at(index, &pass), x, None)?;
            x = y;
            if let Some(&saved) = saved.get(index).filter(|_| index >= lowest) {
                layers.push(activations.only(saved));
            }
        }
        let scored = rows::gather(&x, rows.scored(batch))?;
        drop(x);
        let (hidden, rho) = norm::forward(&scored, &self.norm, self.config.rms_norm_eps)?;
        let want = if keep == Keep::Scores { Want::Scores } else { Want::Gradient };
        let (scores, slope) = completion_logps::score(&hidden, &self.head, &batch.targets, want)?;
        let activations = slope.zip(dropout_key).map(|(slope, dropout_key)| Activations {
            layers,
            scored,
            rho,
            slope,
            rows,
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
        let Activations { mut layers, scored, rho, slope, rows, dropout_key } = activations;
        let pass = Pass::new(Some(adapters), &rows, Some(dropout_key), &batch.row_keys);
        let d_hidden = completion_logps::backward(&slope, slopes)?;
        drop(slope);
        let d_scored = norm::backward(&d_hidden, &scored, &self.norm, &rho, &scored.zeros_like()?)?;
        let count = rows.last.as_ref().map_or(batch.ids.len(), |(last, _)| last.rows.len());
        let zeros = Tensor::zeros((count, self.config.hidden_size), self.dtype(), self.device())?;
        let mut dx = rows::scatter_add(&zeros, rows.scored(batch), &d_scored)?;
        drop((zeros, d_hidden, d_scored, scored));
        for index in (self.lowest_adapted(Some(adapters))..self.layers.len()).rev() {
            let Some(activations) = layers.pop() else { break };
            // below the lowest adapter nothing learns, so its layer's input needs no gradient
            let wanted = !layers.is_empty();
            match self.layer_backward(&self.at(index, &pass), dx, activations, wanted, gradients)? {
                Some(d) => dx = d,
                None => break,
            }
        }
        Ok(())
    }

    /// The lowest layer that has an adapter.
    fn lowest_adapted(&self, adapters: Option<&Adapters>) -> usize {
        let has_adapter = |module: &usize| adapters.is_some_and(|adapters| adapters.get(*module).is_some());
        let modules = self.layers.len() * Projection::ALL.len();
        (0..modules).find(has_adapter).map_or(self.layers.len(), |module| module / Projection::ALL.len())
    }

    fn rows(&self, batch: &Packed) -> Result<Rows> {
        let angles = self.angles(&batch.positions)?;
        let last = batch.last_rows().map(|last| {
            let angles = angles.of_rows(&last.rows)?;
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
        rows::gather(&self.embedding, ids)
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
        let rows = Rows { segments: Segments::new(vec![vec![segment]]), angles, last: None };
        let pass = Pass::new(adapters, &rows, None, &[]);
        let mut x = self.embed(ids)?;
        for (index, cache) in cache.iter().enumerate() {
            x = self.layer(&self.at(index, &pass), x, Some((cache, filled)))?.0;
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
        at: &At<'_>,
        x: Tensor,
        cache: Option<(&LayerCache, usize)>,
    ) -> Result<(Tensor, LayerActivations)> {
        let mut projected = at.project(&x)?;
        if let Some((cache, filled)) = cache {
            (projected.k, projected.v) = cache.append(&projected.k, &projected.v, filled)?;
        }
        let attention = at.attend(&projected)?;
        let (middle, normed) = at.middle(&x, &attention)?;
        let mlp = at.mlp(&normed)?;
        drop(normed);
        let y = at.finish(&middle, &mlp)?;
        let (projected, attention, middle, mlp) = (Some(projected), Some(attention), Some(middle), Some(mlp));
        Ok((y, LayerActivations { x, projected, attention, middle, mlp }))
    }

    /// The gradient of a layer's input, if it is `wanted`. What the layer did not keep, and norms and the MLP's product
    /// in any case, are computed again.
    fn layer_backward(
        &self,
        at: &At<'_>,
        dy: Tensor,
        kept: LayerActivations,
        wanted: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let LayerActivations { x, mut projected, attention, middle, mlp } = kept;
        let attention = match attention {
            Some(attention) => attention,
            None => {
                let again = projected.insert(at.project(&x)?);
                at.attend(again)?
            }
        };
        let (middle, normed) = match middle {
            Some(middle) => {
                let normed = norm::again(&middle.x, &at.layer.mlp_norm, &middle.rho)?;
                (middle, normed)
            }
            None => at.middle(&x, &attention)?,
        };
        let mlp = match mlp {
            Some(mlp) => mlp,
            None => at.mlp(&normed)?,
        };
        let mut learn = |projection: Projection, gradient: Option<LowRankGradient>| match gradient {
            Some(gradient) => gradients.add(at.module(projection), gradient),
            None => Ok(()),
        };
        let [output, down, gate, up] =
            [Projection::Output, Projection::Down, Projection::Gate, Projection::Up].map(|p| at.kept_branch(p));
        let d_middle = {
            let g = linear::between([&dy], &[down])?;
            let dh = linear::input_gradient([&dy], &[down], g.as_ref())?;
            let swiglu::Backward { h, d_gate, d_up } = swiglu::backward(&dh, &mlp.gate, &mlp.up)?;
            let [gradient] = linear::update_gradients([&dy], &[down], g.as_ref(), &h, None)?;
            learn(Projection::Down, gradient)?;
            drop((dh, h));
            let (d_gate_up, inner) = ([&d_gate, &d_up], mlp.inner.as_ref());
            let (d_normed, [of_gate, of_up]) = linear::backward(d_gate_up, &[gate, up], &normed, inner, true)?;
            learn(Projection::Gate, of_gate)?;
            learn(Projection::Up, of_up)?;
            norm::backward(&asked(d_normed)?, &middle.x, &at.layer.mlp_norm, &middle.rho, &dy)?
        };
        drop((dy, normed, mlp));

        let inner = middle.inner.as_ref();
        let (d_output, [gradient]) = linear::backward([&d_middle], &[output], &attention.output, inner, true)?;
        learn(Projection::Output, gradient)?;
        drop(middle);
        let projected = match projected {
            Some(projected) => projected,
            None => at.project(&x)?,
        };
        let Projected { rho, q, k, v, inner, query_inner } = &projected;
        let (dq, dk, dv) =
            attention::backward(&asked(d_output)?, q, k, v, &attention, self.config.heads(), at.segments())?;
        drop(attention);
        let dq = rope::turn(&dq, at.query_angles(), Turn::Backward)?;
        let dk = rope::turn(&dk, &at.pass.rows.angles, Turn::Backward)?;
        let normed = norm::again(&x, &at.layer.attention_norm, rho)?;
        let [query, key, value] = [Projection::Query, Projection::Key, Projection::Value];
        let (key_branch, value_branch) = (at.branch(key), at.branch(value));
        let (d_normed, of_query, of_key, of_value) = if let Some((last, _)) = at.last {
            let branches = [key_branch, value_branch];
            let (d_normed, [k, v]) = linear::backward([&dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            let (normed, inner) = (at.kept(&normed)?, query_inner.as_ref());
            let (d_kept, [q]) = linear::backward([&dq], &[at.kept_branch(query)], &normed, inner, wanted)?;
            let both = d_normed.zip(d_kept);
            (both.map(|(all, kept)| rows::scatter_add(&all, &last.rows, &kept)).transpose()?, q, k, v)
        } else {
            let branches = [at.branch(query), key_branch, value_branch];
            let (d_normed, [q, k, v]) =
                linear::backward([&dq, &dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            (d_normed, q, k, v)
        };
        learn(query, of_query)?;
        learn(key, of_key)?;
        learn(value, of_value)?;
        let Some(d_normed) = d_normed else { return Ok(None) };
        let residual = match at.last {
            Some((last, _)) => rows::scatter_add(&x.zeros_like()?, &last.rows, &d_middle)?,
            None => d_middle,
        };
        norm::backward(&d_normed, &x, &at.layer.attention_norm, rho, &residual).map(Some)
    }
}

/// A gradient that was asked for.
fn asked(gradient: Option<Tensor>) -> Result<Tensor> {
    gradient.ok_or_else(|| candle_core::Error::Msg("a gradient was not computed".into()))
}

impl LayerActivations {
    /// Leaves what `saved` says.
    fn only(self, saved: Saved) -> Self {
        let Self { x, projected, attention, middle, mlp } = self;
        Self {
            x,
            projected: projected.filter(|_| saved <= Saved::WithoutGateUp),
            attention: attention.filter(|_| saved <= Saved::AttentionAndInput),
            middle: middle.filter(|_| saved <= Saved::WithoutGateUp),
            mlp: mlp.filter(|_| saved == Saved::All),
        }
    }
}

impl Rows {
    /// The scored rows among those that leave the last layer.
    fn scored<'r>(&'r self, batch: &'r Packed) -> &'r [u32] {
        self.last.as_ref().map_or(&batch.scored_rows, |(last, _)| &last.scored)
    }
}
