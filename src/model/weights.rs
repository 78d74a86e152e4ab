//! Weights of a Hugging Face folder: one safetensors file or the shards that an index names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::ModelError;
use super::decoder::{Decoder, DecoderConfig, Layer, Linear, Projection};
use crate::progress::Console;
use crate::tensor_file::{TensorFile, read_text};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Tensors that a checkpoint may hold and a decoder has no use for.
fn is_known_extra(name: &str, config: &DecoderConfig) -> bool {
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

    /// A hash of all files, which names the base.
    #[must_use]
    pub fn fingerprint(&self, console: &Console) -> String {
        let bar = console.bytes_bar("hashing weights", self.files.iter().map(|f| f.num_bytes() as u64).sum());
        let mut hasher = blake3::Hasher::new();
        for chunk in self.files.iter().flat_map(TensorFile::chunks) {
            hasher.update(chunk);
            bar.advance(chunk.len() as u64);
        }
        hasher.finalize().to_string()
    }

    /// Reads all weights of a decoder as `dtype` (F32 or F64) onto the CPU.
    ///
    /// # Errors
    /// A tensor is missing, has another shape than the config gives, or is left over.
    pub fn decoder(&self, config: DecoderConfig, dtype: DType, console: &Console) -> Result<Decoder, ModelError> {
        let mut unused = self.places.clone();
        let bar = console.bytes_bar("loading weights", self.files.iter().map(|f| f.num_bytes() as u64).sum());
        let mut read = |name: &str, shape: &[usize]| -> Result<Tensor, ModelError> {
            unused.remove(name);
            let Some(&file) = self.places.get(name) else {
                return Err(ModelError::File {
                    file: self.folder.clone(),
                    problem: format!("no weight file has tensor `{name}`"),
                    help: Some("config.json and the weights do not belong together, or a shard is missing".into()),
                });
            };
            let tensor = self.files[file].read(name, shape, dtype)?;
            bar.advance(self.files[file].tensor_bytes(name) as u64);
            Ok(tensor)
        };
        let d = config.hidden_size;
        let embedding = read("model.embed_tokens.weight", &[config.vocab_size, d])?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            let mut linear = |projection: Projection| {
                let (outputs, inputs) = config.shape(projection);
                let weight = read(&path(&format!("{}.weight", projection.name())), &[outputs, inputs])?;
                let bias = config
                    .has_bias(projection)
                    .then(|| read(&path(&format!("{}.bias", projection.name())), &[outputs]))
                    .transpose()?;
                Ok::<_, ModelError>(Linear { weight, bias })
            };
            let projections = [
                linear(Projection::Query)?,
                linear(Projection::Key)?,
                linear(Projection::Value)?,
                linear(Projection::Output)?,
                linear(Projection::Gate)?,
                linear(Projection::Up)?,
                linear(Projection::Down)?,
            ];
            layers.push(Layer {
                projections,
                attention_norm: read(&path("input_layernorm.weight"), &[d])?,
                mlp_norm: read(&path("post_attention_layernorm.weight"), &[d])?,
            });
        }
        let norm = read("model.norm.weight", &[d])?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => read("lm_head.weight", &[config.vocab_size, d])?,
        };
        if let Some(name) = unused.keys().find(|name| !is_known_extra(name, &config)) {
            return Err(ModelError::File {
                file: self.files[self.places[name]].path().to_owned(),
                problem: format!("tensor `{name}` has no place in this model"),
                help: Some("config.json describes another model than the weights are of".into()),
            });
        }
        Ok(Decoder { config, embedding, layers, norm, head })
    }
}

/// The names of the weight files of a folder.
fn file_names(folder: &Path) -> Result<Vec<String>, ModelError> {
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
