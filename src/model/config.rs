//! What shapes a decoder, and the names of its parts.

use crate::ops::attention::Heads;

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

    pub(super) fn heads(&self) -> Heads {
        Heads {
            queries: self.num_attention_heads,
            keys: self.num_key_value_heads,
            dimension: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5),
        }
    }
}
