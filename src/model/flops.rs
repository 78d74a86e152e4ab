//! How many operations the least possible pass over some rows takes, an addition and a multiplication counting as two.
//!
//! It is the physical limit that a run is measured by: nothing is computed twice, nothing padded, no gradient of a frozen
//! matrix. What a backward pass computes again because it was not kept is not in it
//! ([`Shape::recomputed_flops`](super::memory::Shape::recomputed_flops)).

use super::Projection;
use super::memory::Shape;

/// What a pass works on; sums over batches are as good as one batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// `T`, rows.
    pub rows: f64,
    /// `R`, tokens scored.
    pub scored: f64,
    /// `A`, pairs of a query and a key that it sees.
    pub pairs: f64,
    /// Rows that score nothing; the last layer does not compute them past keys and values.
    pub skipped: f64,
}

/// Operations by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// The base's matrices in the layers.
    pub linears: f64,
    /// Scores, weighted sums, and their gradients.
    pub attention: f64,
    /// The adapters' matrices.
    pub lora: f64,
    /// The head.
    pub head: f64,
}

impl Load {
    /// `factor` times as much.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        let Self { rows, scored, pairs, skipped } = self;
        Self { rows: rows * factor, scored: scored * factor, pairs: pairs * factor, skipped: skipped * factor }
    }
}

impl Work {
    /// All of it.
    #[must_use]
    pub fn total(self) -> f64 {
        self.linears + self.attention + self.lora + self.head
    }
}

impl Shape {
    /// Forward and backward with adapters.
    ///
    /// ```text
    /// linears    2 N T forward, 2 N' T backward       N' those of layers that learn
    ///            − 2 S (lin − 2 D K) in each          rows that the last layer leaves out
    ///            − 2 T D (Q + 2 K) backward           nobody asks for the gradient of the lowest layer's input
    /// attention  4 Q A forward, 10 Q A backward       a layer; the softmax is made again from its log-sum-exp
    /// LoRA       6 r (in + out) T                     a module
    /// head       4 D V R                              logits and U in one pass
    /// ```
    #[must_use]
    pub fn training_work(&self, load: Load) -> Work {
        let size = |p: Projection| {
            let (outputs, inputs) = self.decoder.shape(p);
            (outputs * inputs) as f64
        };
        let layer: f64 = Projection::ALL.into_iter().map(size).sum();
        let key_value = size(Projection::Key) + size(Projection::Value);
        let layers = self.ranks.len() as f64;
        let learning = (self.ranks.len() - self.lowest_adapted()) as f64;
        let (q, _) = self.decoder.shape(Projection::Query);
        let forward = 2.0 * layers * layer * load.rows;
        let backward = 2.0 * learning * layer * load.rows;
        let left_out = 2.0 * load.skipped * (layer - key_value);
        let unasked = 2.0 * load.rows * (size(Projection::Query) + key_value);
        Work {
            linears: forward + backward - 2.0 * left_out - unasked,
            attention: 4.0 * q as f64 * load.pairs * (layers + 2.5 * learning),
            lora: 6.0 * self.adapter_parameters() as f64 * load.rows,
            head: 4.0 * self.head() * load.scored,
        }
    }

    /// One forward pass of the base alone: the reference.
    #[must_use]
    pub fn scoring_work(&self, load: Load) -> Work {
        let layer: usize = Projection::ALL.into_iter().map(|p| self.decoder.shape(p)).map(|(o, i)| o * i).sum();
        let layers = self.ranks.len() as f64;
        let (q, _) = self.decoder.shape(Projection::Query);
        Work {
            linears: 2.0 * layers * layer as f64 * load.rows,
            attention: 4.0 * q as f64 * layers * load.pairs,
            lora: 0.0,
            head: 2.0 * self.head() * load.scored,
        }
    }

    fn head(&self) -> f64 {
        (self.decoder.hidden_size * self.decoder.vocab_size) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::{decoder, rank_16};
    use super::*;

    /// A pair of UltraFeedback's median lengths: a prompt of 121 tokens, completions of 288.
    fn pair() -> Load {
        let (p, c) = (121.0, 288.0);
        let causal = |n: f64| n * (n + 1.0) / 2.0;
        Load { rows: p + 2.0 * (c - 1.0), scored: 2.0 * c, pairs: causal(p) + 2.0 * (c * p + causal(c)), skipped: p }
    }

    /// GFLOP of that pair by a model of the same formulas that was written apart from this one, in Python.
    #[test]
    fn a_pair_of_known_models() {
        for (model, attention, lora, head, training, with_reference) in [
            (decoder(288, 6, 6, 6, 768, 32000), 3.9, 2.2, 21.2, 43.2, 63.2),
            (decoder(768, 12, 12, 12, 2048, 32000), 20.7, 11.7, 56.6, 319.8, 472.0),
            (decoder(576, 30, 9, 3, 1536, 49152), 38.8, 20.4, 65.2, 417.2, 608.0),
            (decoder(2048, 16, 32, 8, 8192, 128_256), 73.5, 47.0, 605.0, 3394.0, 5070.0),
            (decoder(4096, 32, 32, 8, 14336, 128_256), 294.0, 175.0, 1210.0, 20946.0, 31336.0),
        ] {
            let shape = rank_16(&model);
            let work = shape.training_work(pair());
            let near = |found: f64, expected: f64| {
                let rounding = if expected.fract() == 0.0 { 0.53 } else { 0.0501 };
                assert!((found / 1e9 - expected).abs() <= rounding, "{found} {expected}");
            };
            near(work.attention, attention);
            near(work.lora, lora);
            near(work.head, head);
            near(work.total(), training);
            near(work.total() + shape.scoring_work(pair()).total(), with_reference);
        }
    }

    #[test]
    fn layers_without_adapters_have_no_backward_pass() {
        let model = decoder(768, 12, 12, 12, 2048, 32000);
        let all = rank_16(&model).training_work(pair());
        let upper: Vec<usize> = (0..84).map(|module| if module >= 42 { 16 } else { 0 }).collect();
        let half = Shape::new(&model, &upper).training_work(pair());
        assert_eq!(half.lora, all.lora / 2.0);
        let layer = (4 * 768 * 768 + 3 * 768 * 2048) as f64;
        assert!((all.linears - half.linears - 6.0 * 2.0 * layer * pair().rows).abs() < 1.0);
    }
}
