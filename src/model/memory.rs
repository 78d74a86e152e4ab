//! What the decoder holds in memory while it learns, in bytes, and what it costs to hold less.
//!
//! The formulas follow `decoder.rs` tensor by tensor; whoever changes what a layer keeps changes them too. Elements are
//! f32, on a GPU bf16. `T` rows, and the decoder's own letters: `D` hidden, `F` intermediate, `Q = H·E`, `K` key/value columns.

use serde::Serialize;

use super::{DecoderConfig, Projection};
use crate::ops::attention::GPU_SCORES;
use crate::ops::completion_logps::GPU_CHUNK;
use crate::ops::cpu::completion_logps;
use crate::quant::Kept;

/// Bytes of an element.
const F32: usize = 4;

/// What a layer keeps from its forward pass for its backward pass, most to least. The rest is computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Saved {
    /// Its input, q, k, v, attention's output with its log-sum-exp, the residual stream after attention, gate, up, the
    /// norms' scales, and `x Aᵀ` of each adapted projection.
    All,
    /// All but gate and up.
    WithoutGateUp,
    /// Its input, and attention's output with its log-sum-exp.
    AttentionAndInput,
    /// Its input.
    Input,
}

impl Saved {
    /// All levels, most to least.
    pub const LEVELS: [Self; 4] = [Self::All, Self::WithoutGateUp, Self::AttentionAndInput, Self::Input];

    /// The level in words.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::All => "everything",
            Self::WithoutGateUp => "all but gate and up",
            Self::AttentionAndInput => "input and attention",
            Self::Input => "input only",
        }
    }
}

/// Ranks of one layer's adapters by [`Projection`], 0 where there is none.
pub type Ranks = [usize; Projection::KINDS];

/// A decoder with its adapters, as far as their sizes go.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The base.
    pub decoder: DecoderConfig,
    /// Adapters, layer by layer.
    pub ranks: Vec<Ranks>,
    /// Whether a GPU computes, in bf16.
    pub on_gpu: bool,
}

/// Rows of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// `T`, all of them.
    pub all: usize,
    /// `S`, those that score a token: the last layer computes no others past its keys and values.
    pub scored: usize,
}

/// What a batch takes at its worst moment, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Kept for the backward pass.
    pub saved: usize,
    /// Computed and dropped again.
    pub scratch: usize,
}

impl Footprint {
    /// Both.
    #[must_use]
    pub fn total(self) -> usize {
        self.saved + self.scratch
    }
}

/// Elements that one row leaves in the parts of a layer.
struct Parts {
    /// x
    input: usize,
    /// q, and `x Aᵀ` for it
    query: usize,
    /// k, v, the norm's scale, and `x Aᵀ` for them
    key_value: usize,
    /// attention's output and log-sum-exp
    attention: usize,
    /// the residual stream after attention, its norm's scale, and `x Aᵀ` for o
    middle: usize,
    /// gate, up, and `x Aᵀ` for them
    gate_up: usize,
}

impl Shape {
    /// A decoder with adapters of `ranks` on its modules, 0 where there is none, in the order of
    /// [`DecoderConfig::modules`].
    #[must_use]
    pub fn new(decoder: &DecoderConfig, ranks: &[usize]) -> Self {
        let layer = |of_layer: &[usize]| {
            let mut ranks = Ranks::default();
            for (&projection, &rank) in decoder.projections().iter().zip(of_layer) {
                ranks[projection as usize] = rank;
            }
            ranks
        };
        Self {
            decoder: decoder.clone(),
            ranks: ranks.chunks(decoder.projections().len()).map(layer).collect(),
            on_gpu: false,
        }
    }

    /// Bytes of an element.
    fn element(&self) -> usize {
        if self.on_gpu { 2 } else { F32 }
    }

    /// Bytes of the frozen weights where they are.
    #[must_use]
    pub fn base_bytes(&self) -> usize {
        let Self { decoder, on_gpu, .. } = self;
        if !on_gpu {
            return decoder.num_bytes();
        }
        let heads = if decoder.tie_word_embeddings { 1 } else { 2 };
        let vocabulary = heads * decoder.vocab_size * decoder.hidden_size * self.element();
        let kept = |&p: &Projection| {
            let (outputs, inputs) = decoder.shape(p);
            match decoder.quant.of_linear(inputs) {
                Kept::Blocks(kind) if kind.block_size() == 1 => outputs * inputs * self.element(),
                Kept::Dense => outputs * inputs * self.element(),
                kept => kept.num_bytes(outputs, inputs),
            }
        };
        // of a file that is quantized, embedding and head are among its bytes, and count twice
        let layers = || decoder.num_layers() * decoder.projections().iter().map(kept).sum::<usize>();
        vocabulary + decoder.quantized_bytes.unwrap_or_else(layers)
    }

    /// Logits at work, and on a GPU a layer out of its blocks and attention's scores.
    fn scratch(&self, rows: usize) -> [usize; 2] {
        let Self { decoder, on_gpu, .. } = self;
        if !on_gpu {
            return [completion_logps::scratch_bytes(F32), 0];
        }
        let scores = GPU_SCORES.min(decoder.num_attention_heads * rows * rows * 2 * (F32 + self.element()));
        let logits = GPU_CHUNK.min(rows) * decoder.vocab_size * (F32 + self.element());
        [logits, scores + decoder.layer_elements() * self.element()]
    }

    /// The lowest layer with an adapter: those below it keep nothing and have no backward pass.
    #[must_use]
    pub fn lowest_adapted(&self) -> usize {
        self.ranks.iter().position(|ranks| *ranks != Ranks::default()).unwrap_or(self.ranks.len())
    }

    /// Parameters of the adapters.
    #[must_use]
    pub fn adapter_parameters(&self) -> usize {
        (0..self.ranks.len()).map(|layer| self.adapters_on(layer, self.decoder.projections())).sum()
    }

    /// Parameters of the adapters on some projections of a layer.
    fn adapters_on(&self, layer: usize, projections: &[Projection]) -> usize {
        projections.iter().map(|&p| self.sides(p) * self.ranks[layer][p as usize]).sum()
    }

    /// Inputs and outputs of a projection together.
    fn sides(&self, projection: Projection) -> usize {
        let (outputs, inputs) = self.decoder.shape(projection);
        outputs + inputs
    }

    fn outputs(&self, projection: Projection) -> usize {
        self.decoder.shape(projection).0
    }

    fn parts(&self, layer: usize) -> Parts {
        let ranks = |of: &[Projection]| of.iter().map(|&p| self.ranks[layer][p as usize]).sum::<usize>();
        let (d, heads) = (self.decoder.hidden_size, self.decoder.num_attention_heads);
        let (q, kv, f) =
            (self.outputs(Projection::Query), self.outputs(Projection::Key), self.outputs(Projection::Gate));
        let keys = self.decoder.num_key_value_heads;
        // before a norm on their heads, and its scales
        let (bare_q, bare_k) = if self.decoder.qk_norm { (q + heads, kv + keys) } else { (0, 0) };
        let behind = if self.decoder.post_norms { d + 1 } else { 0 };
        Parts {
            input: d,
            query: q + bare_q + ranks(&[Projection::Query]),
            key_value: 2 * kv + bare_k + 1 + ranks(&[Projection::Key, Projection::Value, Projection::QueryKeyValue]),
            attention: q + heads,
            middle: d + 1 + behind + ranks(&[Projection::Output]),
            gate_up: 2 * f + behind + ranks(&[Projection::Gate, Projection::Up, Projection::GateUp]),
        }
    }

    /// Bytes that a layer keeps of one row.
    #[must_use]
    pub fn bytes_per_row(&self, layer: usize, saved: Saved) -> usize {
        self.kept(layer, saved, Rows { all: 1, scored: 1 })
    }

    /// Bytes that a layer keeps of a batch.
    #[must_use]
    pub fn kept(&self, layer: usize, saved: Saved, rows: Rows) -> usize {
        if layer < self.lowest_adapted() { 0 } else { self.held(layer, saved, rows) }
    }

    fn held(&self, layer: usize, saved: Saved, Rows { all, scored }: Rows) -> usize {
        let Parts { input, query, key_value, attention, middle, gate_up } = self.parts(layer);
        // the rows that go on past the keys and values
        let on = if layer + 1 == self.ranks.len() { scored.min(all) } else { all };
        let mut elements = all * input;
        if saved <= Saved::AttentionAndInput {
            elements += on * attention;
        }
        if saved <= Saved::WithoutGateUp {
            elements += on * (query + middle) + all * key_value;
        }
        if saved == Saved::All {
            elements += on * gate_up;
        }
        self.element() * elements
    }

    /// Operations that a layer does again for some rows because it did not keep everything. `pairs` are those of a query
    /// and a key that it sees.
    #[must_use]
    pub fn recomputed_flops(&self, layer: usize, saved: Saved, rows: f64, pairs: f64) -> f64 {
        if layer < self.lowest_adapted() {
            return 0.0;
        }
        // of the matrices, and of the adapters on them or on those that they are fused to
        let products = |of: &[Projection], adapted: &[Projection]| -> f64 {
            let size = |p: &Projection| self.decoder.shape(*p).0 * self.decoder.shape(*p).1;
            rows * 2.0 * (of.iter().map(size).sum::<usize>() + self.adapters_on(layer, adapted)) as f64
        };
        let [q, k, v, o, gate, up, down] = Projection::ALL;
        let mut flops = 0.0;
        if saved >= Saved::WithoutGateUp {
            flops += products(&[gate, up], &[gate, up, Projection::GateUp]);
            if self.decoder.post_norms {
                flops += products(&[down], &[down]);
            }
        }
        if saved >= Saved::AttentionAndInput {
            flops += products(&[q, k, v, o], &[q, k, v, o, Projection::QueryKeyValue]);
        }
        if saved == Saved::Input {
            flops += 4.0 * self.outputs(Projection::Query) as f64 * pairs;
        }
        flops
    }

    /// The most that a forward and backward pass over one batch holds at once besides weights and gradients.
    ///
    /// The worst moment is one of these, `kept(l)` being what the layers up to `l` keep:
    ///
    /// - forward, at the end of layer `l`: `kept(l − 1)`, all of layer `l`, the MLP's product `[T, F]` and the layer's
    ///   output `[T, D]`;
    /// - the head: `kept(L)`, hidden states before and after the norm and `U`, `3 [S, D]`, and a panel of logits;
    /// - backward, in the MLP of layer `l`: `kept(l − 1)`, all of layer `l` (what it did not keep is there again),
    ///   four of `[T, F]` (gradients of product, gate and up, and the product itself) and two of `[T, D]` (gradient of
    ///   the output, normed input);
    /// - backward, in its attention: `kept(l − 1)`, layer `l` without its MLP, gradients of q, k, v and of attention's
    ///   output, and three of `[T, D]`.
    ///
    /// To which comes room for two of `[T, F]` that stays unused between tensors of different sizes (measured).
    #[must_use]
    pub fn training(&self, saved: &[Saved], rows: Rows) -> Footprint {
        let (d, q) = (self.decoder.hidden_size, self.outputs(Projection::Query));
        let (kv, f) = (self.outputs(Projection::Key), self.outputs(Projection::Gate));
        let last = self.ranks.len() - 1;
        let all_kept: usize = saved.iter().enumerate().map(|(l, &level)| self.kept(l, level, rows)).sum();
        let [logits, more] = self.scratch(rows.all);
        let head = all_kept + 3 * self.element() * rows.scored * d + logits;
        // both halves of a fused matrix's columns, before they are split or after they are joined
        let fused = if self.decoder.fused { 2 * f } else { 0 };
        let (mut peak, mut kept) = (head, 0);
        for (layer, &level) in saved.iter().enumerate() {
            let on = if layer == last { rows.scored.min(rows.all) } else { rows.all };
            let everything = self.held(layer, Saved::All, rows);
            let forward = everything + self.element() * on * (f + d + fused);
            peak = peak.max(kept + forward);
            if layer >= self.lowest_adapted() {
                let mlp = everything + self.element() * on * (4 * f + 2 * d + fused);
                let attention = self.held(layer, Saved::WithoutGateUp, rows)
                    + self.element() * (on * (2 * q + d) + rows.all * (2 * kv + 2 * d));
                peak = peak.max(kept + mlp.max(attention));
            }
            kept += self.kept(layer, level, rows);
        }
        let unused = 2 * self.element() * rows.all * f;
        Footprint { saved: all_kept, scratch: peak + unused + more - all_kept }
    }

    /// The most that a forward pass that keeps nothing holds at once: the reference, an evaluation. While the rows of one of
    /// policy and reference are in a layer, those of the other wait before it, `[T, D]`; in the head, `[S, D]`.
    #[must_use]
    pub fn scoring(&self, rows: Rows) -> Footprint {
        let (d, f) = (self.decoder.hidden_size, self.outputs(Projection::Gate));
        let fused = if self.decoder.fused { 2 * f } else { 0 };
        let layer = self.held(0, Saved::All, rows) + self.element() * rows.all * (f + 2 * d + fused);
        let [logits, more] = self.scratch(rows.all);
        let head = 3 * self.element() * rows.scored * d + logits;
        Footprint { saved: 0, scratch: layer.max(head) + more }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::model::family;

    /// A model of these sizes: hidden, layers, heads, key/value heads, intermediate, vocabulary.
    pub(crate) fn decoder(d: usize, layers: usize, heads: usize, kv: usize, f: usize, v: usize) -> DecoderConfig {
        let config = json!({
            "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": v, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
        });
        family::from_json(Path::new("config.json"), config).expect("a decoder")
    }

    /// Adapters of rank 16 on everything.
    pub(crate) fn rank_16(decoder: &DecoderConfig) -> Shape {
        Shape::new(decoder, &vec![16; decoder.modules().len()])
    }

    /// KiB a token over all layers, without adapters: two norms' scales and the log-sum-exp come on top of `2D + 2Q + 2K
    /// + 2F`.
    #[test]
    fn bytes_of_known_models() {
        for (shape, everything, without_gate_up, input) in [
            (decoder(288, 6, 6, 6, 768, 32000), 76.5, 40.5, 6.75),
            (decoder(768, 12, 12, 12, 2048, 32000), 408.0, 216.0, 36.0),
            (decoder(576, 30, 9, 3, 1536, 49152), 675.0, 315.0, 67.5),
        ] {
            let layers = shape.num_layers();
            let extra = layers * (shape.num_attention_heads + 2) * F32;
            let mut ranks = Ranks::default();
            ranks[Projection::Down as usize] = 1;
            let rank_zero = Shape { decoder: shape.clone(), ranks: vec![ranks; layers], on_gpu: false };
            let kib = |saved, extra: usize| {
                let bytes: usize = (0..layers).map(|layer| rank_zero.bytes_per_row(layer, saved)).sum();
                (bytes - extra) as f64 / 1024.0
            };
            assert_eq!(kib(Saved::All, extra), everything);
            assert_eq!(kib(Saved::WithoutGateUp, extra), without_gate_up);
            assert_eq!(kib(Saved::Input, 0), input);
        }
    }

    #[test]
    fn what_is_not_kept_costs_operations_and_no_level_is_for_nothing() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let shape = rank_16(&decoder);
        for pair in Saved::LEVELS.windows(2) {
            assert!(shape.bytes_per_row(3, pair[0]) > shape.bytes_per_row(3, pair[1]));
            let flops = |saved| shape.recomputed_flops(3, saved, 1.0, 300.0);
            assert!(flops(pair[0]) < flops(pair[1]));
        }
        // gate and up: 4 D F, and 2 R (D + F) each for the adapters
        let gate_up = 4.0 * 576.0 * 1536.0 + 2.0 * 2.0 * 16.0 * (576.0 + 1536.0);
        assert_eq!(shape.recomputed_flops(3, Saved::WithoutGateUp, 1.0, 300.0), gate_up);
    }

    #[test]
    fn layers_below_the_lowest_adapter_keep_nothing() {
        let decoder = decoder(64, 4, 4, 2, 128, 100);
        let ranks: Vec<usize> = (0..28).map(|module| if module >= 14 + 3 { 8 } else { 0 }).collect();
        let shape = Shape::new(&decoder, &ranks);
        assert_eq!(shape.lowest_adapted(), 2);
        assert_eq!(shape.bytes_per_row(1, Saved::All), 0);
        assert!(shape.bytes_per_row(2, Saved::Input) > 0);
        assert_eq!(shape.adapter_parameters(), 8 * (128 + 3 * 192) + 8 * (128 + 2 * 96 + 128 + 3 * 192));
    }

    #[test]
    fn keeping_less_never_takes_more() {
        let decoder = decoder(576, 30, 9, 3, 1536, 49152);
        let shape = rank_16(&decoder);
        let rows = Rows { all: 2048, scored: 1700 };
        let mut saved = vec![Saved::All; 30];
        let mut before = shape.training(&saved, rows).total();
        for level in Saved::LEVELS {
            for layer in 0..30 {
                saved[layer] = level;
                let now = shape.training(&saved, rows).total();
                assert!(now <= before, "{level:?} in layer {layer}");
                before = now;
            }
        }
    }
}
