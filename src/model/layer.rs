//! One layer, forward and backward. What it keeps between the two is up to the caller.
//!
//! ```text
//! x ─ norm ─ q,k,v ─ rope ─ attention ─ o ─(+x)─ norm ─ gate,up ─ glu ─ down ─(+)─
//!   └──── project ───────┘ └─ attend ─┘ └── middle ───┘ └─ mlp ─┘ └─── finish ───┘
//! ```
//!
//! Some families have norms on the heads of q and k before rope, and behind o and down.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::config::{DecoderConfig, Projection};
use super::memory::Saved;
use super::packed::{LastRows, Packed};
use crate::adapter::{Adapters, Gradients};
use crate::ops::attention::{self, Segments};
use crate::ops::dropout::{self, Dropout};
use crate::ops::linear::{self, Branch, LowRank, LowRankGradient};
use crate::ops::rope::{self, Angles, Turn};
use crate::ops::{glu, norm, rows};
use crate::quant::Weight;

/// A frozen matrix of the base.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub(super) weight: Weight,
    pub(super) bias: Option<Tensor>,
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    pub(super) mlp_norm: Tensor,
    /// Of q and k, `[E]`.
    pub(super) head_norms: Option<[Tensor; 2]>,
    /// Behind attention and behind the MLP.
    pub(super) post_norms: Option<[Tensor; 2]>,
    /// In the order of [`DecoderConfig::projections`].
    pub(super) projections: Vec<Linear>,
}

/// What a layer keeps, by its [`Saved`].
#[derive(Debug)]
pub(super) struct LayerActivations {
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
    /// Queries and keys before the norm of their heads.
    bare: Option<[Normed; 2]>,
}

/// What a norm was applied to, and its scale.
#[derive(Debug)]
struct Normed {
    x: Tensor,
    rho: Tensor,
}

/// The residual stream between attention and MLP.
#[derive(Debug)]
struct Middle {
    x: Tensor,
    rho: Tensor,
    inner: Option<Tensor>,
    /// What o gave, where a norm is behind it.
    behind: Option<Normed>,
}

#[derive(Debug)]
struct Mlp {
    gate: Tensor,
    up: Tensor,
    inner: Option<Tensor>,
    /// What down gave, where a norm is behind it.
    behind: Option<Normed>,
}

/// Which rows attend to which, and where they stand; made once a batch and used in every layer.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) segments: Segments,
    /// By each of the decoder's tables.
    pub(super) angles: Vec<Angles>,
    /// What is different in the last layer.
    pub(super) last: Option<(LastRows, Vec<Angles>)>,
}

/// One forward or backward pass: which adapters, which dropout.
pub(super) struct Pass<'a> {
    pub(super) adapters: Option<&'a Adapters>,
    pub(super) rows: &'a Rows,
    dropout_key: Option<u64>,
    row_keys: &'a [u64],
    last_row_keys: Vec<u64>,
}

impl<'a> Pass<'a> {
    /// No row keys where nothing is dropped out.
    pub(super) fn new(
        adapters: Option<&'a Adapters>,
        rows: &'a Rows,
        dropout_key: Option<u64>,
        row_keys: &'a [u64],
    ) -> Self {
        let last = rows.last.iter().flat_map(|(last, _)| &last.rows);
        let last_row_keys = match row_keys {
            [] => Vec::new(),
            keys => last.map(|&row| keys[row as usize]).collect(),
        };
        Self { adapters, rows, dropout_key, row_keys, last_row_keys }
    }
}

/// A layer within a pass.
pub(super) struct At<'a> {
    pub(super) config: &'a DecoderConfig,
    pub(super) index: usize,
    pub(super) layer: &'a Layer,
    pub(super) pass: &'a Pass<'a>,
    /// Set in the last layer, where not every row goes on.
    pub(super) last: Option<&'a (LastRows, Vec<Angles>)>,
}

impl<'a> At<'a> {
    fn module(&self, projection: Projection) -> usize {
        self.index * self.config.projections().len() + self.config.slot(projection)
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
        let Linear { weight, bias } = &self.layer.projections[self.config.slot(projection)];
        let module = self.module(projection);
        let adapter = |adapters: &'a Adapters| {
            let lora = adapters.get(module)?;
            let dropout = self.pass.dropout_key.filter(|_| adapters.dropout() > 0.0).map(|key| Dropout {
                probability: adapters.dropout(),
                key: dropout::key(key, module as u64),
                rows: row_keys,
            });
            Some(LowRank { dropout, ..lora.low_rank() })
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

    /// Where queries and keys stand, in a layer that knows of positions.
    fn angles(&self) -> Option<[&'a Angles; 2]> {
        let table = self.config.layers[self.index].rope?;
        let all = &self.pass.rows.angles;
        Some([self.last.map_or(all, |(_, angles)| angles), all].map(|angles| &angles[table]))
    }

    fn segments(&self) -> &'a Segments {
        self.last.map_or(&self.pass.rows.segments, |(last, _)| &last.segments)
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor)> {
        norm::forward(x, weight, self.config.rms_norm_eps)
    }

    /// A norm over each head of `x [T, heads·E]`.
    fn norm_heads(&self, x: Tensor, weight: &Tensor) -> Result<(Tensor, Normed)> {
        let (y, rho) = self.norm(&self.by_head(&x)?, weight)?;
        Ok((y.reshape(x.shape())?, Normed { x, rho }))
    }

    /// `[T·heads, E]` of `[T, heads·E]`
    fn by_head(&self, x: &Tensor) -> Result<Tensor> {
        x.reshape(((), self.config.head_dim))
    }

    fn unnorm_heads(&self, dy: &Tensor, Normed { x, rho }: &Normed, weight: &Tensor) -> Result<Tensor> {
        norm::backward(&self.by_head(dy)?, &self.by_head(x)?, weight, rho, None)?.reshape(x.shape())
    }

    /// norm, q, k, v, rope
    fn project(&self, x: &Tensor) -> Result<Projected> {
        let (normed, rho) = self.norm(x, &self.layer.attention_norm)?;
        let [query, key, value] = [Projection::Query, Projection::Key, Projection::Value];
        let (mut q, mut k, v, inner, query_inner) = if self.config.fused {
            let ([all], inner) = linear::forward(&normed, &[self.branch(Projection::QueryKeyValue)], None)?;
            let [q, k, v] = split(&all, [query, key, value].map(|p| self.config.shape(p).0))?;
            (self.kept(&q)?, k, v, inner, None)
        } else if self.last.is_some() {
            let ([k, v], inner) = linear::forward(&normed, &[self.branch(key), self.branch(value)], None)?;
            let ([q], query_inner) = linear::forward(&self.kept(&normed)?, &[self.kept_branch(query)], None)?;
            (q, k, v, inner, query_inner)
        } else {
            let branches = [self.branch(query), self.branch(key), self.branch(value)];
            let ([q, k, v], inner) = linear::forward(&normed, &branches, None)?;
            (q, k, v, inner, None)
        };
        let mut bare = None;
        if let Some([of_query, of_key]) = &self.layer.head_norms {
            let (normed_q, bare_q) = self.norm_heads(q, of_query)?;
            let (normed_k, bare_k) = self.norm_heads(k, of_key)?;
            (q, k, bare) = (normed_q, normed_k, Some([bare_q, bare_k]));
        }
        if let Some([of_query, of_key]) = self.angles() {
            [q, k] = rope::turn_both([&q, &k], [of_query, of_key], Turn::Forward)?;
        }
        Ok(Projected { rho, q, k, v, inner, query_inner, bare })
    }

    fn attend(&self, Projected { q, k, v, .. }: &Projected) -> Result<attention::Saved> {
        attention::forward(q, k, v, self.config.heads(self.index), self.segments())
    }

    /// `x` plus a projection of `y`, and what that gave where a norm is `behind` it.
    fn onto(
        &self,
        x: &Tensor,
        y: &Tensor,
        projection: Projection,
        behind: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>, Option<Normed>)> {
        let branch = [self.kept_branch(projection)];
        let Some(weight) = behind else {
            let ([sum], inner) = linear::forward(y, &branch, Some(x))?;
            return Ok((sum, inner, None));
        };
        let ([bare], inner) = linear::forward(y, &branch, None)?;
        let (normed, rho) = self.norm(&bare, weight)?;
        Ok(((x + normed)?, inner, Some(Normed { x: bare, rho })))
    }

    fn post_norm(&self, which: usize) -> Option<&'a Tensor> {
        self.layer.post_norms.as_ref().map(|norms| &norms[which])
    }

    /// o, the residual, and the scale of the norm that follows
    fn middle(&self, x: &Tensor, attention: &attention::Saved) -> Result<(Middle, Tensor)> {
        let behind = self.post_norm(0);
        let (x, inner, behind) = self.onto(&self.kept(x)?, &attention.output, Projection::Output, behind)?;
        let (normed, rho) = self.norm(&x, &self.layer.mlp_norm)?;
        Ok((Middle { x, rho, inner, behind }, normed))
    }

    /// gate and up
    fn mlp(&self, normed: &Tensor) -> Result<Mlp> {
        let (gate, up, inner) = if self.config.fused {
            let ([both], inner) = linear::forward(normed, &[self.kept_branch(Projection::GateUp)], None)?;
            let [gate, up] = split(&both, [self.config.intermediate_size; 2])?;
            (gate, up, inner)
        } else {
            let branches = [self.kept_branch(Projection::Gate), self.kept_branch(Projection::Up)];
            let ([gate, up], inner) = linear::forward(normed, &branches, None)?;
            (gate, up, inner)
        };
        Ok(Mlp { gate, up, inner, behind: None })
    }

    /// The unit, down and the residual
    fn finish(&self, middle: &Middle, mlp: &mut Mlp) -> Result<Tensor> {
        let h = glu::forward(&mlp.gate, &mlp.up, self.config.activation)?;
        let (y, _, behind) = self.onto(&middle.x, &h, Projection::Down, self.post_norm(1))?;
        mlp.behind = behind;
        Ok(y)
    }

    /// The layer's output and all that it could keep. With a cache, `x` continues the positions in it.
    pub(super) fn forward(
        &self,
        x: Tensor,
        cache: Option<(&LayerCache, &[Placed])>,
    ) -> Result<(Tensor, LayerActivations)> {
        let mut projected = self.project(&x)?;
        if let Some((cache, places)) = cache {
            (projected.k, projected.v) = cache.extend(&projected.k, &projected.v, places)?;
        }
        let attention = self.attend(&projected)?;
        let (middle, normed) = self.middle(&x, &attention)?;
        let mut mlp = self.mlp(&normed)?;
        drop(normed);
        let y = self.finish(&middle, &mut mlp)?;
        let (projected, attention, middle, mlp) = (Some(projected), Some(attention), Some(middle), Some(mlp));
        Ok((y, LayerActivations { x, projected, attention, middle, mlp }))
    }

    /// The gradient of a layer's input, if it is `wanted`. What the layer did not keep, and norms and the MLP's product
    /// in any case, are computed again.
    pub(super) fn backward(
        &self,
        dy: Tensor,
        kept: LayerActivations,
        wanted: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let LayerActivations { x, mut projected, attention, middle, mlp } = kept;
        let attention = match attention {
            Some(attention) => attention,
            None => {
                let again = projected.insert(self.project(&x)?);
                self.attend(again)?
            }
        };
        let (middle, normed) = match middle {
            Some(middle) => {
                let normed = norm::again(&middle.x, &self.layer.mlp_norm, &middle.rho)?;
                (middle, normed)
            }
            None => self.middle(&x, &attention)?,
        };
        let mlp = match mlp {
            Some(mlp) => mlp,
            None => {
                let mut mlp = self.mlp(&normed)?;
                if self.post_norm(1).is_some() {
                    self.finish(&middle, &mut mlp)?;
                }
                mlp
            }
        };
        let mut learn = |projection: Projection, gradient: Option<LowRankGradient>| match gradient {
            Some(gradient) => gradients.add(self.module(projection), gradient),
            None => Ok(()),
        };
        // the gradient of what a projection gave, where a norm is behind it
        let bare = |dy: &Tensor, which: usize, behind: &Option<Normed>| match (self.post_norm(which), behind) {
            (Some(weight), Some(Normed { x, rho })) => norm::backward(dy, x, weight, rho, None),
            _ => Ok(dy.clone()),
        };
        let [output, down] = [Projection::Output, Projection::Down].map(|p| self.kept_branch(p));
        let d_middle = {
            let d_down = bare(&dy, 1, &mlp.behind)?;
            let g = linear::between([&d_down], &[down])?;
            let dh = linear::input_gradient([&d_down], &[down], g.as_ref())?;
            let glu::Backward { h, d_gate, d_up } = glu::backward(&dh, &mlp.gate, &mlp.up, self.config.activation)?;
            let [gradient] = linear::update_gradients([&d_down], &[down], g.as_ref(), &h, None)?;
            learn(Projection::Down, gradient)?;
            drop((dh, h, d_down));
            let inner = mlp.inner.as_ref();
            let d_normed = if self.config.fused {
                let both = [Projection::GateUp].map(|p| self.kept_branch(p));
                let d_both = Tensor::cat(&[d_gate, d_up], 1)?;
                let (d_normed, [gradient]) = linear::backward([&d_both], &both, &normed, inner, true)?;
                learn(Projection::GateUp, gradient)?;
                d_normed
            } else {
                let both = [Projection::Gate, Projection::Up].map(|p| self.kept_branch(p));
                let (d_normed, [of_gate, of_up]) = linear::backward([&d_gate, &d_up], &both, &normed, inner, true)?;
                learn(Projection::Gate, of_gate)?;
                learn(Projection::Up, of_up)?;
                d_normed
            };
            norm::backward(&asked(d_normed)?, &middle.x, &self.layer.mlp_norm, &middle.rho, Some(&dy))?
        };
        drop((dy, normed, mlp));

        let d_bare = bare(&d_middle, 0, &middle.behind)?;
        let inner = middle.inner.as_ref();
        let (d_output, [gradient]) = linear::backward([&d_bare], &[output], &attention.output, inner, true)?;
        learn(Projection::Output, gradient)?;
        drop((middle, d_bare));
        let projected = match projected {
            Some(projected) => projected,
            None => self.project(&x)?,
        };
        let Projected { rho, q, k, v, inner, query_inner, bare } = &projected;
        let heads = self.config.heads(self.index);
        let (mut dq, mut dk, dv) =
            attention::backward(&asked(d_output)?, q, k, v, &attention, heads, self.segments())?;
        drop(attention);
        if let Some([of_query, of_key]) = self.angles() {
            [dq, dk] = rope::turn_both([&dq, &dk], [of_query, of_key], Turn::Backward)?;
        }
        if let (Some([of_query, of_key]), Some([bare_q, bare_k])) = (&self.layer.head_norms, bare) {
            dq = self.unnorm_heads(&dq, bare_q, of_query)?;
            dk = self.unnorm_heads(&dk, bare_k, of_key)?;
        }
        let normed = norm::again(&x, &self.layer.attention_norm, rho)?;
        let [query, key, value] = [Projection::Query, Projection::Key, Projection::Value];
        let d_normed = if self.config.fused {
            if let Some((last, _)) = self.last {
                let zeros = Tensor::zeros((dk.dims()[0], dq.dims()[1]), dq.dtype(), dq.device())?;
                dq = rows::scatter_add(&zeros, &last.rows, &dq)?;
            }
            let all = Tensor::cat(&[dq, dk, dv], 1)?;
            let branches = [self.branch(Projection::QueryKeyValue)];
            let (d_normed, [gradient]) = linear::backward([&all], &branches, &normed, inner.as_ref(), wanted)?;
            learn(Projection::QueryKeyValue, gradient)?;
            d_normed
        } else if let Some((last, _)) = self.last {
            let branches = [self.branch(key), self.branch(value)];
            let (d_normed, [k, v]) = linear::backward([&dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            let (normed, inner) = (self.kept(&normed)?, query_inner.as_ref());
            let (d_kept, [q]) = linear::backward([&dq], &[self.kept_branch(query)], &normed, inner, wanted)?;
            learn(query, q)?;
            learn(key, k)?;
            learn(value, v)?;
            d_normed.zip(d_kept).map(|(all, kept)| rows::scatter_add(&all, &last.rows, &kept)).transpose()?
        } else {
            let branches = [self.branch(query), self.branch(key), self.branch(value)];
            let (d_normed, [q, k, v]) =
                linear::backward([&dq, &dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            learn(query, q)?;
            learn(key, k)?;
            learn(value, v)?;
            d_normed
        };
        let Some(d_normed) = d_normed else { return Ok(None) };
        let residual = match self.last {
            Some((last, _)) => rows::scatter_add(&x.zeros_like()?, &last.rows, &d_middle)?,
            None => d_middle,
        };
        norm::backward(&d_normed, &x, &self.layer.attention_norm, rho, Some(&residual)).map(Some)
    }
}

/// The columns of `x`, so many at a time.
fn split<const N: usize>(x: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let mut start = 0;
    let mut parts = Vec::with_capacity(N);
    for width in widths {
        parts.push(x.narrow(1, start, width)?.contiguous()?);
        start += width;
    }
    parts.try_into().map_err(|_| candle_core::Error::Msg("one part a width".into()))
}

/// Rows of new keys and values, and the row of the cache that they begin at.
pub(super) type Placed = (Range<usize>, usize);

/// Keys and values of earlier positions of one layer.
#[derive(Debug, Clone)]
pub(super) struct LayerCache {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
}

impl LayerCache {
    /// Writes some rows of `k, v [n, K·E]` each to where it belongs, and returns the whole of both caches.
    fn extend(&self, k: &Tensor, v: &Tensor, places: &[Placed]) -> Result<(Tensor, Tensor)> {
        for (rows, place) in places {
            self.keys.slice_set(&k.narrow(0, rows.start, rows.len())?, 0, *place)?;
            self.values.slice_set(&v.narrow(0, rows.start, rows.len())?, 0, *place)?;
        }
        Ok((self.keys.clone(), self.values.clone()))
    }
}

/// A gradient that was asked for.
fn asked(gradient: Option<Tensor>) -> Result<Tensor> {
    gradient.ok_or_else(|| candle_core::Error::Msg("a gradient was not computed".into()))
}

impl LayerActivations {
    /// Leaves what `saved` says.
    pub(super) fn only(self, saved: Saved) -> Self {
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
    pub(super) fn scored<'r>(&'r self, batch: &'r Packed) -> &'r [u32] {
        self.last.as_ref().map_or(&batch.scored_rows, |(last, _)| &last.scored)
    }
}
