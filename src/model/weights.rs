//! Weights of a Hugging Face folder, one safetensors file or the shards that an index names, and of GGUF files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use super::ModelError;
use super::config::{DecoderConfig, Projection};
use super::decoder::Decoder;
use super::family;
use super::layer::{Layer, Linear};
use crate::gguf::{self, GgufFile};
use crate::progress::{Bar, Console};
use crate::quant::nf4::{self, Nf4, Scales};
use crate::quant::{self, Bytes, Kept, Quant, Quantized, Weight};
use crate::tensor_file::{TensorFile, read_text};

pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";

/// Tensors that a checkpoint may hold and a decoder has no use for.
fn is_known_extra(name: &str, config: &DecoderConfig) -> bool {
    // the other parts of a model of several
    let parts = ["vision_tower.", "multi_modal_projector."];
    if config.root != "model" && parts.iter().any(|part| name.trim_start_matches("model.").starts_with(part)) {
        return true;
    }
    // older Llama checkpoints carry rope's frequencies, which the config gives; tied ones may repeat the head
    name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight")
}

/// The safetensors files of a model folder.
#[derive(Debug)]
pub struct WeightFiles {
    files: Vec<TensorFile>,
    /// Tensor name → index into `files`.
    places: BTreeMap<String, usize>,
    folder: PathBuf,
}

impl WeightFiles {
    /// Opens the files and checks their headers; no weight is read yet.
    ///
    /// # Errors
    /// No weights are there, or a file is missing, truncated or broken.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let names = file_names(folder)?;
        let mut files = Vec::new();
        let mut places = BTreeMap::new();
        for name in names {
            let file = TensorFile::open(&folder.join(name))?;
            for tensor in file.names() {
                if let Some(other) = places.insert(tensor.clone(), files.len()) {
                    let other: &TensorFile = &files[other];
                    return Err(ModelError::File {
                        file: file.path().to_owned(),
                        problem: format!("tensor `{tensor}` is in {} too", other.path().display()),
                        help: Some("the folder mixes the shards of two downloads; fetch it again".into()),
                    });
                }
            }
            files.push(file);
        }
        Ok(Self { files, places, folder: folder.to_owned() })
    }

    /// Paths of the files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(TensorFile::path)
    }

    /// All bytes of the files, one after the other.
    pub fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        self.files.iter().flat_map(TensorFile::chunks)
    }

    /// Length of all files in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.files.iter().map(TensorFile::num_bytes).sum()
    }

    /// Every tensor by name, with the file that it is in.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorFile)> {
        self.places.iter().map(|(name, &file)| (name.as_str(), &self.files[file]))
    }

    /// What a part is called in these files.
    #[must_use]
    pub fn name_of(&self, part: &Part, config: &DecoderConfig) -> String {
        part.place.in_hugging_face(self.root(config), config.post_norms)
    }

    /// Reads all weights of a decoder onto the CPU: dense ones as `dtype` (F32 or F64), matrices as `config.quant` keeps
    /// them.
    ///
    /// # Errors
    /// A tensor is missing, has another shape than the config gives, or is left over.
    pub fn decoder(&self, config: DecoderConfig, dtype: DType, console: &Console) -> Result<Decoder, ModelError> {
        let bar = console.bytes_bar("loading weights", self.files.iter().map(|f| f.num_bytes() as u64).sum());
        let mut reader = self.reader(&config, dtype, bar);
        let decoder = assemble(config, &mut reader)?;
        if let Some(name) = reader.unused.iter().find(|name| !is_known_extra(name, &decoder.config)) {
            return Err(ModelError::File {
                file: self.files[self.places[*name]].path().to_owned(),
                problem: format!("tensor `{name}` has no place in this model"),
                help: Some("config.json describes another model than the weights are of".into()),
            });
        }
        Ok(decoder)
    }

    fn reader<'f>(&'f self, config: &DecoderConfig, dtype: DType, bar: Bar<'f>) -> Reader<'f> {
        Reader {
            files: self,
            unused: self.places.keys().map(String::as_str).collect(),
            root: self.root(config),
            post_norms: config.post_norms,
            dtype,
            bar,
        }
    }

    /// What the names of tensors begin with: a model of several parts was once saved otherwise than it is named.
    fn root(&self, config: &DecoderConfig) -> &'static str {
        const BEFORE: &str = "language_model.model";
        let is = |root: &str| self.places.contains_key(&format!("{root}.embed_tokens.weight"));
        if !is(config.root) && is(BEFORE) { BEFORE } else { config.root }
    }
}

/// Takes a decoder's tensors out of files, one after the other.
struct Reader<'f> {
    files: &'f WeightFiles,
    unused: BTreeSet<&'f str>,
    root: &'static str,
    post_norms: bool,
    dtype: DType,
    bar: Bar<'f>,
}

/// Where a decoder's tensors come from, under Hugging Face's names within the model.
trait Tensors {
    /// A matrix, kept as `kept` says where the file has it as numbers.
    fn matrix(&mut self, place: Place, shape: [usize; 2], kept: Kept) -> Result<Weight, ModelError>;

    /// A vector, `offset` added.
    fn vector(&mut self, place: Place, len: usize, offset: f64) -> Result<Tensor, ModelError>;
}

/// A tensor's part in a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Embedding,
    Norm,
    Head,
    AttentionNorm(usize),
    MlpNorm(usize),
    QueryNorm(usize),
    KeyNorm(usize),
    AfterAttention(usize),
    AfterMlp(usize),
    Weight(usize, Projection),
    Bias(usize, Projection),
}

impl Place {
    /// Hugging Face's name. Where norms stand behind attention and MLP too, one of those before has another name.
    fn in_hugging_face(self, root: &str, post_norms: bool) -> String {
        let of = |layer: usize, name: &str| format!("{root}.layers.{layer}.{name}");
        match self {
            Self::Embedding => format!("{root}.embed_tokens.weight"),
            Self::Norm => format!("{root}.norm.weight"),
            Self::Head => "lm_head.weight".to_owned(),
            Self::AttentionNorm(layer) => of(layer, "input_layernorm.weight"),
            Self::MlpNorm(layer) if post_norms => of(layer, "pre_feedforward_layernorm.weight"),
            Self::MlpNorm(layer) | Self::AfterAttention(layer) => of(layer, "post_attention_layernorm.weight"),
            Self::QueryNorm(layer) => of(layer, "self_attn.q_norm.weight"),
            Self::KeyNorm(layer) => of(layer, "self_attn.k_norm.weight"),
            Self::AfterMlp(layer) => of(layer, "post_feedforward_layernorm.weight"),
            Self::Weight(layer, projection) => of(layer, &format!("{}.weight", projection.name())),
            Self::Bias(layer, projection) => of(layer, &format!("{}.bias", projection.name())),
        }
    }

    /// llama.cpp's name.
    fn in_gguf(self) -> String {
        let of = |layer: usize, name: &str| format!("blk.{layer}.{name}");
        let projection = |projection: Projection| match projection {
            Projection::Query => "attn_q",
            Projection::Key => "attn_k",
            Projection::Value => "attn_v",
            Projection::Output => "attn_output",
            Projection::Gate => "ffn_gate",
            Projection::Up | Projection::GateUp => "ffn_up",
            Projection::Down => "ffn_down",
            Projection::QueryKeyValue => "attn_qkv",
        };
        match self {
            Self::Embedding => "token_embd.weight".to_owned(),
            Self::Norm => "output_norm.weight".to_owned(),
            Self::Head => "output.weight".to_owned(),
            Self::AttentionNorm(layer) => of(layer, "attn_norm.weight"),
            Self::MlpNorm(layer) => of(layer, "ffn_norm.weight"),
            Self::QueryNorm(layer) => of(layer, "attn_q_norm.weight"),
            Self::KeyNorm(layer) => of(layer, "attn_k_norm.weight"),
            Self::AfterAttention(layer) => of(layer, "post_attention_norm.weight"),
            Self::AfterMlp(layer) => of(layer, "post_ffw_norm.weight"),
            Self::Weight(layer, p) => of(layer, &format!("{}.weight", projection(p))),
            Self::Bias(layer, p) => of(layer, &format!("{}.bias", projection(p))),
        }
    }
}

/// One tensor of a decoder, in Hugging Face's order of rows.
#[derive(Debug, Clone)]
pub struct Part {
    place: Place,
    shape: Vec<usize>,
    /// How a matrix is kept.
    kept: Kept,
    /// What is added to the values in a folder.
    offset: f64,
    module: Option<usize>,
}

impl Part {
    /// Its name in Hugging Face's model.
    #[must_use]
    pub fn name(&self, config: &DecoderConfig) -> String {
        self.place.in_hugging_face(config.root, config.post_norms)
    }

    /// llama.cpp's name.
    #[must_use]
    pub fn gguf_name(&self) -> String {
        self.place.in_gguf()
    }

    /// Rows and columns of a matrix, length of a vector.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its number among [`DecoderConfig::modules`], if it is the matrix of one.
    #[must_use]
    pub fn module(&self) -> Option<usize> {
        self.module
    }

    /// How a matrix is kept while training.
    #[must_use]
    pub fn kept(&self) -> Kept {
        self.kept
    }

    /// Whether it is embedding or head.
    #[must_use]
    pub fn is_vocabulary(&self) -> bool {
        matches!(self.place, Place::Embedding | Place::Head)
    }

    /// Whether its rows are those of queries or keys, which llama.cpp turns in some architectures.
    #[must_use]
    pub fn is_turned(&self) -> bool {
        matches!(
            self.place,
            Place::Weight(_, Projection::Query | Projection::Key)
                | Place::Bias(_, Projection::Query | Projection::Key)
        )
    }
}

impl DecoderConfig {
    /// Every tensor of the decoder: the embedding, the layers from the first, the last norm, and the head if it is one of
    /// its own.
    ///
    /// # Errors
    /// What candle returns.
    pub fn parts(&self) -> Result<Vec<Part>, ModelError> {
        /// Notes what is asked for, and gives nothing.
        struct Recorder<'c>(Vec<Part>, &'c DecoderConfig);
        impl Tensors for Recorder<'_> {
            fn matrix(&mut self, place: Place, shape: [usize; 2], kept: Kept) -> Result<Weight, ModelError> {
                let of_layer = self.1.projections().len();
                let module = match place {
                    Place::Weight(layer, projection) => Some(layer * of_layer + self.1.slot(projection)),
                    _ => None,
                };
                self.0.push(Part { place, shape: shape.to_vec(), kept, offset: 0.0, module });
                Ok(Weight::Dense(Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?))
            }

            fn vector(&mut self, place: Place, len: usize, offset: f64) -> Result<Tensor, ModelError> {
                self.0.push(Part { place, shape: vec![len], kept: Kept::Dense, offset, module: None });
                Ok(Tensor::zeros(0, DType::F32, &Device::Cpu)?)
            }
        }
        let mut recorder = Recorder(Vec::new(), self);
        assemble(self.clone(), &mut recorder)?;
        Ok(recorder.0)
    }
}

/// The files of a base, open.
#[derive(Debug)]
pub enum BaseFiles {
    /// Safetensors of a folder.
    Folder(WeightFiles),
    /// A GGUF file.
    Gguf(GgufFile),
}

impl BaseFiles {
    /// Length of all files in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Folder(files) => files.num_bytes(),
            Self::Gguf(file) => file.num_bytes(),
        }
    }

    /// The type of 16 bits that the matrices of a folder are stored in, which keeps them as they are.
    #[must_use]
    pub fn float_of(&self, config: &DecoderConfig) -> Quant {
        use safetensors::tensor::Dtype;
        let Self::Folder(files) = self else { return Quant::None };
        let parts = config.parts().unwrap_or_default();
        let all = |dtype: Dtype| {
            let mut matrices = parts.iter().filter(|part| part.shape.len() == 2);
            matrices.all(|part| {
                let name = files.name_of(part, config);
                files
                    .places
                    .get(&name)
                    .and_then(|&file| files.files[file].raw(&name))
                    .is_some_and(|raw| raw.0 == dtype)
            })
        };
        match () {
            () if all(Dtype::BF16) => Quant::Bf16,
            () if all(Dtype::F16) => Quant::F16,
            () => Quant::None,
        }
    }

    /// One tensor as the decoder has it: a matrix kept as it is while training, rows in Hugging Face's order, and the
    /// vector that a norm multiplies by (f32, one-dimensional).
    ///
    /// # Errors
    /// It is missing, broken, or of another shape than the configuration gives.
    pub fn read(&self, part: &Part, config: &DecoderConfig) -> Result<Weight, ModelError> {
        let silent = Console::silent();
        let mut from: Box<dyn Tensors + '_> = match self {
            Self::Folder(files) => Box::new(files.reader(config, DType::F32, silent.bytes_bar("", 0))),
            Self::Gguf(file) => Box::new(GgufReader::new(file, config, DType::F32)),
        };
        match part.shape[..] {
            [rows, columns] => from.matrix(part.place, [rows, columns], part.kept),
            _ => from.vector(part.place, part.shape.iter().product(), part.offset).map(Weight::Dense),
        }
    }
}

/// Tensors made on a GPU, for measuring: matrices in NF4 of any indices, or of normal numbers.
#[cfg(feature = "cuda")]
struct Random<'d> {
    device: &'d Device,
    dtype: DType,
    recent: std::sync::Arc<crate::ops::cuda::weight::Recent>,
}

#[cfg(feature = "cuda")]
impl Tensors for Random<'_> {
    fn matrix(&mut self, place: Place, [rows, columns]: [usize; 2], kept: Kept) -> Result<Weight, ModelError> {
        // outputs as large as inputs
        let deviation = (columns as f32).recip().sqrt();
        if let (Kept::Nf4, Place::Weight(..)) = (kept, place) {
            // NF4's sixteen values, drawn evenly, have this root mean square
            const SPREAD: f32 = 0.49;
            let matrix = crate::ops::cuda::weight::Resident::random_nf4(
                rows,
                columns,
                deviation / SPREAD,
                self.device,
                &self.recent,
            )?;
            return Ok(Weight::OnDevice(matrix));
        }
        Ok(Weight::Dense(Tensor::randn(0f32, deviation, (rows, columns), self.device)?.to_dtype(self.dtype)?))
    }

    fn vector(&mut self, place: Place, len: usize, _: f64) -> Result<Tensor, ModelError> {
        let value = if matches!(place, Place::Bias(..)) { 0f32 } else { 1.0 };
        Ok(Tensor::full(value, len, self.device)?)
    }
}

/// A decoder of random weights made on a GPU, for measuring.
///
/// # Errors
/// What candle returns: most likely that memory is full.
#[cfg(feature = "cuda")]
pub fn random_decoder(config: DecoderConfig, dtype: DType, device: &Device) -> Result<Decoder, ModelError> {
    let recent = crate::ops::cuda::weight::Recent::new(config.layer_elements());
    let mut decoder = assemble(config, &mut Random { device, dtype, recent })?;
    decoder.dtype = dtype;
    Ok(decoder)
}

/// Puts a decoder together.
fn assemble(config: DecoderConfig, from: &mut dyn Tensors) -> Result<Decoder, ModelError> {
    let (d, v, quant) = (config.hidden_size, config.vocab_size, config.quant);
    let offset = if config.norm_offset { 1.0 } else { 0.0 };
    let embedding = from.matrix(Place::Embedding, [v, d], quant.of_embedding(d))?;
    let mut layers = Vec::new();
    for layer in 0..config.num_layers() {
        let mut projections = Vec::new();
        for &projection in config.projections() {
            let (outputs, inputs) = config.shape(projection);
            let weight = from.matrix(Place::Weight(layer, projection), [outputs, inputs], quant.of_linear(inputs))?;
            let bias = match config.has_bias(projection) {
                true => Some(from.vector(Place::Bias(layer, projection), outputs, 0.0)?),
                false => None,
            };
            projections.push(Linear { weight, bias });
        }
        let mut norms = |places: [Place; 2], len, there: bool| -> Result<Option<[Tensor; 2]>, ModelError> {
            let [first, second] = places;
            Ok(if there { Some([from.vector(first, len, offset)?, from.vector(second, len, offset)?]) } else { None })
        };
        let head_norms = norms([Place::QueryNorm(layer), Place::KeyNorm(layer)], config.head_dim, config.qk_norm)?;
        let post_norms = norms([Place::AfterAttention(layer), Place::AfterMlp(layer)], d, config.post_norms)?;
        let attention_norm = from.vector(Place::AttentionNorm(layer), d, offset)?;
        let mlp_norm = from.vector(Place::MlpNorm(layer), d, offset)?;
        layers.push(Layer { attention_norm, mlp_norm, head_norms, post_norms, projections });
    }
    let norm = from.vector(Place::Norm, d, offset)?;
    let head = match config.tie_word_embeddings {
        true => embedding.clone(),
        false => from.matrix(Place::Head, [v, d], quant.of_embedding(d))?,
    };
    let dtype = norm.dtype();
    Ok(Decoder { config, embedding, layers, norm, head, dtype })
}

/// Takes a decoder's tensors out of a GGUF file.
struct GgufReader<'f> {
    file: &'f GgufFile,
    unused: BTreeSet<&'f str>,
    /// Rows of q and k stand in pairs within each head of so many.
    paired: Option<usize>,
    dtype: DType,
}

impl<'f> GgufReader<'f> {
    fn new(file: &'f GgufFile, config: &DecoderConfig, dtype: DType) -> Self {
        let paired =
            file.metadata("general.architecture").and_then(gguf::Value::as_str).is_some_and(family::is_paired);
        let unused = file.tensors().map(|(name, _)| name).collect();
        Self { file, unused, paired: paired.then_some(config.head_dim), dtype }
    }
}

impl Tensors for GgufReader<'_> {
    fn matrix(&mut self, place: Place, shape: [usize; 2], _: Kept) -> Result<Weight, ModelError> {
        let name = place.in_gguf();
        self.unused.remove(name.as_str());
        let matrix = self.file.matrix(&name, shape)?;
        Ok(Weight::Quantized(match (self.paired, place) {
            (Some(head_dim), Place::Weight(_, Projection::Query | Projection::Key)) => matrix.unpaired(head_dim),
            _ => matrix,
        }))
    }

    fn vector(&mut self, place: Place, len: usize, offset: f64) -> Result<Tensor, ModelError> {
        let name = place.in_gguf();
        self.unused.remove(name.as_str());
        let mut values = self.file.vector(&name, len)?;
        if let (Some(head_dim), Place::Bias(_, Projection::Query | Projection::Key)) = (self.paired, place) {
            values = (0..len).map(|row| values[quant::paired_row(row, head_dim)]).collect();
        }
        let tensor = Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(self.dtype)?;
        Ok(if offset == 0.0 { tensor } else { (tensor + offset)? })
    }
}

/// Makes a decoder of a GGUF file, whose matrices stay in it. `config` is what [`family::read_gguf`](super::family::read_gguf)
/// made of it.
///
/// # Errors
/// A tensor is missing, has another shape than the metadata gives, or is left over.
pub fn gguf_decoder(file: &GgufFile, config: DecoderConfig, dtype: DType) -> Result<Decoder, ModelError> {
    let mut reader = GgufReader::new(file, &config, dtype);
    let decoder = assemble(config, &mut reader)?;
    // what the configuration was made of
    let known = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];
    match reader.unused.iter().find(|name| !known.contains(name)) {
        Some(name) => Err(ModelError::File {
            file: file.path().to_owned(),
            problem: format!("tensor `{name}` has no place in this model"),
            help: Some("the file holds more than its architecture has".into()),
        }),
        None => Ok(decoder),
    }
}

impl Tensors for Reader<'_> {
    fn vector(&mut self, place: Place, len: usize, offset: f64) -> Result<Tensor, ModelError> {
        let (name, dtype) = (place.in_hugging_face(self.root, self.post_norms), self.dtype);
        let values = self.file(&name)?.read(&name, &[len], dtype)?;
        Ok(if offset == 0.0 { values } else { (values + offset)? })
    }

    fn matrix(&mut self, place: Place, shape: [usize; 2], kept: Kept) -> Result<Weight, ModelError> {
        let (name, dtype) = (place.in_hugging_face(self.root, self.post_norms), self.dtype);
        if self.files.places.contains_key(&format!("{name}.{NF4_STATE}")) {
            return self.nf4(&name, shape);
        }
        let file = self.file(&name)?;
        if kept == Kept::Dense {
            return Ok(Weight::Dense(file.read(&name, &shape, dtype)?));
        }
        let [rows, columns] = shape;
        let Kept::Blocks(kind) = kept else {
            return Ok(kept.keep(rows, columns, file.read_f32(&name, &shape)?)?);
        };
        // so many rows at a time: a large model's embedding is gigabytes of f32
        const PART: usize = 1 << 24;
        let mut blocks = Vec::with_capacity(kept.num_bytes(rows, columns));
        let step = (PART / columns.max(1)).max(1);
        for start in (0..rows).step_by(step) {
            let part = start * columns..(start + step).min(rows) * columns;
            blocks.extend(kind.quantize(&file.read_part(&name, &shape, part)?));
        }
        let blocks = Bytes::Owned(Arc::new(blocks));
        let matrix = Quantized::ggml(rows, columns, kind, blocks).map_err(candle_core::Error::Msg)?;
        Ok(Weight::Quantized(matrix))
    }
}

impl Reader<'_> {
    /// The file that a tensor is in.
    fn file(&mut self, name: &str) -> Result<&TensorFile, ModelError> {
        self.unused.remove(name);
        let Some(&file) = self.files.places.get(name) else {
            return Err(ModelError::File {
                file: self.files.folder.clone(),
                problem: format!("no weight file has tensor `{name}`"),
                help: Some("config.json and the weights do not belong together, or a shard is missing".into()),
            });
        };
        let file = &self.files.files[file];
        self.bar.advance(file.tensor_bytes(name) as u64);
        Ok(file)
    }

    /// A matrix that bitsandbytes has quantized.
    fn nf4(&mut self, name: &str, [rows, columns]: [usize; 2]) -> Result<Weight, ModelError> {
        let part = |part: &str| format!("{name}.{part}");
        let file = self.file(&part(NF4_STATE))?.path().to_owned();
        let error = |problem: String| ModelError::File {
            file: file.clone(),
            problem: format!("tensor `{name}`: {problem}"),
            help: Some("fetch the file again, or load the original model with `quant = \"nf4\"`".into()),
        };
        let bytes = |reader: &mut Self, name: &str| {
            let bytes = reader.file(name)?.bytes(name).map(<[u8]>::to_vec);
            bytes.ok_or_else(|| error(format!("`{name}` holds no bytes")))
        };
        let state = bytes(self, &part(NF4_STATE))?;
        let state: Nf4State =
            serde_json::from_slice(&state).map_err(|e| error(format!("its state is unreadable: {e}")))?;
        if state.shape != [rows, columns] {
            return Err(error(format!("it is {:?}, not {:?}", state.shape, [rows, columns])));
        }
        if (state.quant_type.as_str(), state.blocksize) != ("nf4", nf4::BLOCK) {
            let problem = format!("`{}` in blocks of {} is not supported", state.quant_type, state.blocksize);
            return Err(error(format!("{problem}; nf4 in blocks of {} is", nf4::BLOCK)));
        }
        // the sixteen values are NF4's own
        self.unused.remove(part("quant_map").as_str());
        let numbers = |reader: &mut Self, name: &str, len: usize| {
            Ok::<_, ModelError>(reader.file(name)?.read_f32(name, &[len])?)
        };
        let blocks = (rows * columns).div_ceil(nf4::BLOCK);
        let scales = match (state.nested_blocksize, state.nested_offset) {
            (Some(nf4::NESTED_BLOCK), Some(offset)) => Scales::Nested {
                quantized: bytes(self, &part("absmax"))?,
                code: numbers(self, &part("nested_quant_map"), 256)?,
                scales: numbers(self, &part("nested_absmax"), blocks.div_ceil(nf4::NESTED_BLOCK))?,
                offset,
            },
            (None, None) => Scales::Plain(numbers(self, &part("absmax"), blocks)?),
            (nested, _) => return Err(error(format!("scales in blocks of {nested:?} are not supported"))),
        };
        let packed = bytes(self, name)?;
        let quantized = Nf4::new(packed, rows * columns, scales).and_then(|nf4| Quantized::nf4(rows, columns, nf4));
        quantized.map(Weight::Quantized).map_err(error)
    }
}

/// What bitsandbytes calls the description of a tensor that it has quantized.
const NF4_STATE: &str = "quant_state.bitsandbytes__nf4";

/// That description.
#[derive(Debug, Deserialize)]
struct Nf4State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The names of the weight files of a folder.
pub(super) fn file_names(folder: &Path) -> Result<Vec<String>, ModelError> {
    let index = folder.join(INDEX);
    let error = |file: &Path, problem: String, help: Option<String>| ModelError::File {
        file: file.to_owned(),
        problem,
        help,
    };
    if index.exists() {
        let text = read_text(&index)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| error(&index, format!("is no JSON: {e}"), None))?;
        let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
            return Err(error(&index, "has no `weight_map`".into(), None));
        };
        let mut names = Vec::new();
        for file in map.values() {
            // a name with a folder in it could point anywhere
            match file.as_str().filter(|name| !name.contains(['/', '\\']) && !name.is_empty()) {
                Some(name) => names.push(name.to_owned()),
                None => return Err(error(&index, format!("`weight_map` names {file}, not a file beside it"), None)),
            }
        }
        names.sort_unstable();
        names.dedup();
        return Ok(names);
    }
    if folder.join(SINGLE).exists() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut others: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    others.sort_unstable();
    let pickles = others.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth"));
    let help = if pickles {
        "pickled weights can run code and are not read; save the model again with transformers, which writes safetensors"
    } else {
        "weights are read from model.safetensors, or from the shards of model.safetensors.index.json"
    };
    Err(error(folder, format!("holds no weights (it has {})", others.join(", ")), Some(help.into())))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::adapter::peft::serialize;
    use crate::model::family::read_config;
    use crate::model::tests::{GROUPED, Tiny};

    type Weights = BTreeMap<String, Tensor>;

    fn put(folder: &Path, name: &str, weights: impl IntoIterator<Item = (String, Tensor)>) {
        let weights: Vec<_> = weights.into_iter().collect();
        fs::write(folder.join(name), serialize(&weights).expect("serialised")).expect("written");
    }

    /// A folder with a valid model.
    fn folder(tiny: Tiny) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        tiny.write(folder.path());
        folder
    }

    fn load(folder: &Path) -> Result<Decoder, ModelError> {
        WeightFiles::open(folder)?.decoder(read_config(folder)?, DType::F32, &Console::silent())
    }

    /// File name, problem and help of the error of loading a folder.
    fn error(folder: &Path) -> (String, String, String) {
        match load(folder).expect_err("something is wrong with it") {
            ModelError::File { file, problem, help } => {
                let name = file.strip_prefix(folder).expect("in the folder").display().to_string();
                (name, problem, help.unwrap_or_default())
            }
            other => panic!("{other}"),
        }
    }

    /// The error of loading a model whose weights were changed.
    fn error_after(tiny: Tiny, change: impl FnOnce(&mut Weights)) -> (String, String, String) {
        let folder = folder(tiny);
        let mut weights = tiny.weights();
        change(&mut weights);
        put(folder.path(), SINGLE, weights);
        error(folder.path())
    }

    fn split(folder: &Path) {
        fs::remove_file(folder.join(SINGLE)).expect("removed");
        let (mut first, mut second) = (Weights::new(), Weights::new());
        for (i, (name, tensor)) in GROUPED.weights().into_iter().enumerate() {
            (if i % 2 == 0 { &mut first } else { &mut second }).insert(name, tensor);
        }
        let file = |name: &str| if first.contains_key(name) { "first.safetensors" } else { "second.safetensors" };
        let map: BTreeMap<_, _> = GROUPED.weights().into_keys().map(|name| (name.clone(), file(&name))).collect();
        fs::write(folder.join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string()).expect("written");
        put(folder, "first.safetensors", first);
        put(folder, "second.safetensors", second);
    }

    #[test]
    fn shards_are_read_as_one_file_is() {
        let one = folder(GROUPED);
        let sharded = folder(GROUPED);
        split(sharded.path());
        let (one, sharded) = (load(one.path()).expect("loaded"), load(sharded.path()).expect("loaded"));
        let values = |weight: &Weight| weight.dense(DType::F32).and_then(|w| w.to_vec2::<f32>()).expect("f32");
        assert_eq!(values(&one.head), values(&sharded.head));
        for (a, b) in one.layers.iter().zip(&sharded.layers) {
            for (a, b) in a.projections.iter().zip(&b.projections) {
                assert_eq!(values(&a.weight), values(&b.weight));
            }
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let folder = folder(GROUPED);
        split(folder.path());
        fs::remove_file(folder.path().join("second.safetensors")).expect("removed");
        let (file, problem, _) = error(folder.path());
        assert_eq!((file.as_str(), problem.as_str()), ("second.safetensors", "does not exist"));
    }

    #[test]
    fn a_tensor_in_two_shards_is_an_error() {
        let folder = folder(GROUPED);
        split(folder.path());
        put(folder.path(), "second.safetensors", GROUPED.weights());
        let (file, problem, _) = error(folder.path());
        assert_eq!(file, "second.safetensors");
        assert!(problem.contains("`lm_head.weight` is in") && problem.contains("first.safetensors"), "{problem}");
    }

    #[test]
    fn an_index_cannot_point_out_of_the_folder() {
        for name in ["../other.safetensors", "/etc/passwd", "a\\b", ""] {
            let folder = folder(GROUPED);
            let index = json!({"weight_map": {"lm_head.weight": name}}).to_string();
            fs::write(folder.path().join(INDEX), index).expect("written");
            let (file, problem, _) = error(folder.path());
            assert_eq!(file, INDEX);
            assert!(problem.contains("not a file beside it"), "{problem}");
        }
    }

    #[test]
    fn a_truncated_file_is_named_wherever_it_ends() {
        let folder = folder(GROUPED);
        let path = folder.path().join(SINGLE);
        let whole = fs::read(&path).expect("read");
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
        for length in [0, 5, 8, 100, header, header + 100, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("written");
            let (file, problem, help) = error(folder.path());
            assert_eq!(file, SINGLE);
            assert!(problem.contains(&format!("is cut short: {length} bytes")), "{length}: {problem}");
            assert!(help.contains("fetch the file again"));
        }
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let (_, problem, help) = error_after(GROUPED, |weights| {
            weights.remove("model.layers.1.mlp.up_proj.weight");
        });
        assert_eq!(problem, "no weight file has tensor `model.layers.1.mlp.up_proj.weight`");
        assert!(help.contains("config.json"));
        let (_, problem, _) = error_after(Tiny { bias: true, ..GROUPED }, |weights| {
            weights.remove("model.layers.0.self_attn.k_proj.bias");
        });
        assert!(problem.contains("`model.layers.0.self_attn.k_proj.bias`"), "{problem}");
    }

    #[test]
    fn a_tensor_without_a_use_is_named() {
        // a bias that config.json does not speak of would silently be left out
        for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"] {
            let (file, problem, _) = error_after(GROUPED, |weights| {
                let tensor = Tensor::zeros(16, DType::F32, &Device::Cpu).expect("made");
                weights.insert(name.into(), tensor);
            });
            assert_eq!(file, SINGLE);
            assert_eq!(problem, format!("tensor `{name}` has no place in this model"));
        }
    }

    #[test]
    fn what_checkpoints_are_known_to_repeat_is_passed_over() {
        let tied = Tiny { tied: true, ..GROUPED };
        let folder = folder(tied);
        let mut weights = tied.weights();
        let spare = Tensor::zeros(2, DType::F32, &Device::Cpu).expect("made");
        weights.insert("lm_head.weight".into(), spare.clone());
        weights.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), spare);
        put(folder.path(), SINGLE, weights);
        load(folder.path()).expect("loaded");
    }

    #[test]
    fn a_tensor_of_another_shape_is_named_with_both_shapes() {
        let (file, problem, help) = error_after(GROUPED, |weights| {
            let transposed = weights["model.layers.0.self_attn.q_proj.weight"].t().expect("a matrix");
            weights.insert("model.layers.0.self_attn.q_proj.weight".into(), transposed.contiguous().expect("copied"));
        });
        assert_eq!(file, SINGLE);
        assert_eq!(problem, "tensor `model.layers.0.self_attn.q_proj.weight` is [6, 16], not [16, 6]");
        assert!(help.contains("config"));
    }

    #[test]
    fn a_git_lfs_pointer_is_known_as_one() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1048576\n";
        for name in [SINGLE, "config.json"] {
            let folder = folder(GROUPED);
            fs::write(folder.path().join(name), pointer).expect("written");
            let (file, problem, help) = error(folder.path());
            assert_eq!((file.as_str(), problem.as_str()), (name, "is a Git-LFS pointer, not the file itself"));
            assert!(help.contains("git lfs pull"));
        }
    }

    #[test]
    fn a_folder_without_safetensors_says_what_it_has() {
        let folder = folder(GROUPED);
        fs::rename(folder.path().join(SINGLE), folder.path().join("pytorch_model.bin")).expect("renamed");
        let (_, problem, help) = error(folder.path());
        assert_eq!(problem, "holds no weights (it has config.json, pytorch_model.bin)");
        assert!(help.contains("safetensors") && help.contains("run code"), "{help}");
    }

    #[test]
    fn half_precision_files_are_read_exactly() {
        use safetensors::tensor::{Dtype, TensorView};
        let folder = tempfile::tempdir().expect("a folder");
        let values = [1.5f32, -0.25, 3.0, 65504.0];
        let f16: Vec<u8> = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
        let bf16: Vec<u8> = values[..3].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        let int: Vec<u8> = vec![1; 8];
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).expect("it fits");
        let views = [
            ("f16", view(Dtype::F16, &[2, 2], &f16)),
            ("bf16", view(Dtype::BF16, &[3], &bf16)),
            ("int", view(Dtype::I32, &[2], &int)),
        ];
        let path = folder.path().join("half.safetensors");
        fs::write(&path, safetensors::serialize(views, None).expect("serialised")).expect("written");
        let file = TensorFile::open(&path).expect("opened");
        let read = |name, shape: &[usize]| file.read(name, shape, DType::F32);
        let numbers = |tensor: Tensor| tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        assert_eq!(numbers(read("f16", &[2, 2]).expect("read")), values);
        assert_eq!(numbers(read("bf16", &[3]).expect("read")), values[..3]);
        let error = read("int", &[2]).expect_err("integers are no weights");
        assert!(error.problem.contains("tensor `int` holds I32"), "{}", error.problem);
    }
}
