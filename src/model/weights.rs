//! Weights of a Hugging Face folder: one safetensors file or the shards that an index names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::Value;

use super::ModelError;
use super::config::{DecoderConfig, Projection};
use super::decoder::Decoder;
use super::layer::{Layer, Linear};
use crate::progress::Console;
use crate::tensor_file::{TensorFile, read_text};

pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";

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

    use candle_core::Device;
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
        let values = |tensor: &Tensor| tensor.to_vec2::<f32>().expect("f32");
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
