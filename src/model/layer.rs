//! One layer, forward and backward. What it keeps between the two is up to the caller.
//!
//! ```text
//! x ─ norm ─ q,k,v ─ rope ─ attention ─ o ─(+x)─ norm ─ gate,up ─ swiglu ─ down ─(+)─
//!   └──── project ───────┘ └─ attend ─┘ └── middle ───┘ └─ mlp ─┘ └──── finish ────┘
//! ```

use candle_core::{Result, Tensor};

use super::config::{DecoderConfig, Projection};
use super::memory::Saved;
use super::packed::{LastRows, Packed};
use crate::adapter::{Adapters, Gradients};
use crate::ops::attention::{self, Segments};
use crate::ops::dropout::{self, Dropout};
use crate::ops::linear::{self, Branch, LowRank, LowRankGradient};
use crate::ops::rope::{self, Angles, Turn};
use crate::ops::{norm, rows, swiglu};

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
pub(super) struct Rows {
    pub(super) segments: Segments,
    pub(super) angles: Angles,
    /// What is different in the last layer.
    pub(super) last: Option<(LastRows, Angles)>,
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
    pub(super) last: Option<&'a (LastRows, Angles)>,
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

    /// The layer's output and all that it could keep. With a cache, `x` continues the positions in it.
    pub(super) fn forward(
        &self,
        x: Tensor,
        cache: Option<(&LayerCache, usize)>,
    ) -> Result<(Tensor, LayerActivations)> {
        let mut projected = self.project(&x)?;
        if let Some((cache, filled)) = cache {
            (projected.k, projected.v) = cache.append(&projected.k, &projected.v, filled)?;
        }
        let attention = self.attend(&projected)?;
        let (middle, normed) = self.middle(&x, &attention)?;
        let mlp = self.mlp(&normed)?;
        drop(normed);
        let y = self.finish(&middle, &mlp)?;
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
            None => self.mlp(&normed)?,
        };
        let mut learn = |projection: Projection, gradient: Option<LowRankGradient>| match gradient {
            Some(gradient) => gradients.add(self.module(projection), gradient),
            None => Ok(()),
        };
        let [output, down, gate, up] =
            [Projection::Output, Projection::Down, Projection::Gate, Projection::Up].map(|p| self.kept_branch(p));
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
            norm::backward(&asked(d_normed)?, &middle.x, &self.layer.mlp_norm, &middle.rho, &dy)?
        };
        drop((dy, normed, mlp));

        let inner = middle.inner.as_ref();
        let (d_output, [gradient]) = linear::backward([&d_middle], &[output], &attention.output, inner, true)?;
        learn(Projection::Output, gradient)?;
        drop(middle);
        let projected = match projected {
            Some(projected) => projected,
            None => self.project(&x)?,
        };
        let Projected { rho, q, k, v, inner, query_inner } = &projected;
        let (dq, dk, dv) =
            attention::backward(&asked(d_output)?, q, k, v, &attention, self.config.heads(), self.segments())?;
        drop(attention);
        let dq = rope::turn(&dq, self.query_angles(), Turn::Backward)?;
        let dk = rope::turn(&dk, &self.pass.rows.angles, Turn::Backward)?;
        let normed = norm::again(&x, &self.layer.attention_norm, rho)?;
        let [query, key, value] = [Projection::Query, Projection::Key, Projection::Value];
        let (key_branch, value_branch) = (self.branch(key), self.branch(value));
        let (d_normed, of_query, of_key, of_value) = if let Some((last, _)) = self.last {
            let branches = [key_branch, value_branch];
            let (d_normed, [k, v]) = linear::backward([&dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            let (normed, inner) = (self.kept(&normed)?, query_inner.as_ref());
            let (d_kept, [q]) = linear::backward([&dq], &[self.kept_branch(query)], &normed, inner, wanted)?;
            let both = d_normed.zip(d_kept);
            (both.map(|(all, kept)| rows::scatter_add(&all, &last.rows, &kept)).transpose()?, q, k, v)
        } else {
            let branches = [self.branch(query), key_branch, value_branch];
            let (d_normed, [q, k, v]) =
                linear::backward([&dq, &dk, &dv], &branches, &normed, inner.as_ref(), wanted)?;
            (d_normed, q, k, v)
        };
        learn(query, of_query)?;
        learn(key, of_key)?;
        learn(value, of_value)?;
        let Some(d_normed) = d_normed else { return Ok(None) };
        let residual = match self.last {
            Some((last, _)) => rows::scatter_add(&x.zeros_like()?, &last.rows, &d_middle)?,
            None => d_middle,
        };
        norm::backward(&d_normed, &x, &self.layer.attention_norm, rho, &residual).map(Some)
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
