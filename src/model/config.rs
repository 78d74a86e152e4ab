//! What shapes a decoder, and the names of its parts.

use super::ModelError;
use crate::ops::attention::Heads;
use crate::ops::glu::Activation;
use crate::quant::Quant;

/// Everything that shapes a decoder. A family's file makes it from the model's `config.json` or from GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// `D`
    pub hidden_size: usize,
    /// `F`
    pub intermediate_size: usize,
    /// What differs from layer to layer; as many as there are layers.
    pub layers: Vec<LayerConfig>,
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
    /// Rope's tables, which layers choose from.
    pub ropes: Vec<Rope>,
    /// The head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Which linear modules have a bias.
    pub biases: Biases,
    /// RMSNorm over each head of queries and keys, before rope (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// RMSNorm behind attention and behind the MLP too, before the residual is added (Gemma 2 and 3).
    pub post_norms: bool,
    /// Norms multiply by `1 + w` (Gemma).
    pub norm_offset: bool,
    /// q, k and v are one module, and so are gate and up (Phi 3).
    pub fused: bool,
    /// Of the MLP's gate.
    pub activation: Activation,
    /// What attention's scores are multiplied by, `E^-½` but for Gemma.
    pub attention_scale: f64,
    /// Attention's scores `s` become `c tanh(s / c)` (Gemma 2).
    pub attention_softcap: Option<f64>,
    /// Logits `z` become `c tanh(z / c)` (Gemma 2).
    pub logit_softcap: Option<f64>,
    /// What embeddings are multiplied by (Gemma: `√D`).
    pub embedding_scale: f64,
    /// How matrices are kept in memory.
    pub quant: Quant,
    /// Bytes of the matrices where the file has them quantized, and they are kept as they are.
    pub quantized_bytes: Option<usize>,
    /// What the path of every tensor begins with, `model` but for the text part of a model of several.
    pub root: &'static str,
}

/// One layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Which of the tables turns queries and keys; none in a layer without positions (SmolLM 3).
    pub rope: Option<usize>,
    /// Tokens that a token sees at most, itself the last of them.
    pub window: Option<usize>,
}

/// A table of rope.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the frequencies before any scaling.
    pub theta: f64,
    /// Inverse frequencies, scaling applied, `[E/2]`.
    pub inverse_frequencies: Vec<f32>,
    /// Cosines and sines are multiplied by it.
    pub factor: f32,
    /// Other frequencies for sequences of more tokens than this (Phi 3's longrope).
    pub long: Option<(usize, Vec<f32>)>,
}

/// Which linear modules have a bias.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub query_key_value: bool,
    /// o.
    pub output: bool,
    /// gate, up and down.
    pub mlp: bool,
}

/// A linear module of a layer.
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
    /// `self_attn.qkv_proj`: query, key and value, one below the other.
    QueryKeyValue,
    /// `mlp.gate_up_proj`: gate and up, one below the other.
    GateUp,
}

impl Projection {
    /// Those of a layer where none are fused, in the order of modules.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];
    /// Those of a layer whose modules are fused.
    pub const FUSED: [Self; 4] = [Self::QueryKeyValue, Self::Output, Self::GateUp, Self::Down];
    /// How many kinds there are.
    pub(super) const KINDS: usize = 9;

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
            Self::QueryKeyValue => "self_attn.qkv_proj",
            Self::GateUp => "mlp.gate_up_proj",
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
    /// Number of layers.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The linear modules of a layer, in the order that modules have everywhere.
    #[must_use]
    pub fn projections(&self) -> &'static [Projection] {
        if self.fused { &Projection::FUSED } else { &Projection::ALL }
    }

    /// Elements of the matrices of a layer.
    #[must_use]
    pub fn layer_elements(&self) -> usize {
        self.projections()
            .iter()
            .map(|&projection| self.shape(projection))
            .map(|(rows, columns)| rows * columns)
            .sum()
    }

    /// Where a projection stands among [`DecoderConfig::projections`].
    pub(super) fn slot(&self, projection: Projection) -> usize {
        let slot = self.projections().iter().position(|&p| p == projection);
        slot.unwrap_or_else(|| unreachable!("{projection:?} is no module of this decoder"))
    }

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
            Projection::QueryKeyValue => (q + 2 * kv, d),
            Projection::GateUp => (2 * f, d),
        }
    }

    /// Every linear module that an adapter can sit on, in order: the projections of layer 0, of layer 1, ….
    #[must_use]
    pub fn modules(&self) -> Vec<Module> {
        let of_layer = |layer| {
            self.projections().iter().map(move |&projection| {
                let (outputs, inputs) = self.shape(projection);
                let path = format!("{}.layers.{layer}.{}", self.root, projection.name());
                Module { path, inputs, outputs }
            })
        };
        (0..self.num_layers()).flat_map(of_layer).collect()
    }

    /// Parameters of the base: what its files hold.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        let of = |&p: &Projection| {
            let (outputs, inputs) = self.shape(p);
            outputs * (inputs + usize::from(self.has_bias(p)))
        };
        let layer: usize = self.projections().iter().map(of).sum();
        let norms =
            if self.post_norms { 4 } else { 2 } * self.hidden_size + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        (layer + norms) * self.num_layers() + self.hidden_size * (1 + heads * self.vocab_size)
    }

    /// The same decoder with its matrices kept as a recipe asks for.
    ///
    /// # Errors
    /// They are quantized already, and otherwise.
    pub fn kept(self, quant: Quant) -> Result<Self, ModelError> {
        match (self.quant, quant) {
            (_, Quant::None) => Ok(self),
            (_, asked) if self.quantized_bytes.is_some() => {
                Err(ModelError::Quantized { is: "GGUF's blocks", asked: asked.name() })
            }
            (Quant::None, quant) => Ok(Self { quant, ..self }),
            (is, asked) if is == asked => Ok(self),
            (is, asked) => Err(ModelError::Quantized { is: is.name(), asked: asked.name() }),
        }
    }

    /// Bytes that the base takes in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let shapes = || self.projections().iter().map(|&p| self.shape(p));
        let (d, v) = (self.hidden_size, self.vocab_size);
        let elements: usize = shapes().map(|(outputs, inputs)| outputs * inputs).sum();
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        // norms and biases
        let vectors = 4 * (self.num_parameters() - elements * self.num_layers() - heads * v * d);
        let kept = |(outputs, inputs)| self.quant.of_linear(inputs).num_bytes(outputs, inputs);
        let matrices = self.quantized_bytes.unwrap_or_else(|| {
            let layer: usize = shapes().map(kept).sum();
            layer * self.num_layers() + heads * self.quant.of_embedding(d).num_bytes(v, d)
        });
        matrices + vectors
    }

    pub(super) fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Query | Projection::Key | Projection::Value | Projection::QueryKeyValue => {
                self.biases.query_key_value
            }
            Projection::Output => self.biases.output,
            Projection::Gate | Projection::Up | Projection::Down | Projection::GateUp => self.biases.mlp,
        }
    }

    pub(super) fn heads(&self, layer: usize) -> Heads {
        Heads {
            queries: self.num_attention_heads,
            keys: self.num_key_value_heads,
            dimension: self.head_dim,
            scale: self.attention_scale,
            softcap: self.attention_softcap,
            window: self.layers[layer].window,
        }
    }
}
