//! A merged model as a Hugging Face folder: safetensors, in shards where it is large, and the files beside them.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use clap::ValueEnum;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::merge::dense_rows;
use super::{ExportError, Merge};
use crate::files::{self, WriteError, cannot_write};
use crate::model::{BaseFiles, Part, WeightFiles};
use crate::progress::{Bar, Console};
use crate::quant::Kept;
use crate::tensor_file::{TensorFile, read_text};

/// Numbers that are held at once while one tensor is written.
const PIECE: usize = 1 << 24;

/// Element types of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "their names")]
pub enum Float {
    F32,
    F16,
    Bf16,
}

impl Float {
    /// As transformers calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The type of a file's tensors, if it is one of these.
    fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    fn in_file(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    fn num_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Bytes of `values`, rounded to nearest. `None` where one is too large for the type.
    fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        match self {
            Self::F32 => Some(values.par_iter().flat_map_iter(|x| x.to_le_bytes()).collect()),
            Self::Bf16 => Some(values.par_iter().flat_map_iter(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
            Self::F16 => {
                let fits = values.par_iter().all(|&x| !x.is_finite() || f16::from_f32(x).is_finite());
                fits.then(|| values.par_iter().flat_map_iter(|&x| f16::from_f32(x).to_le_bytes()).collect())
            }
        }
    }
}

/// One tensor of the folder.
struct Tensor<'f> {
    name: String,
    shape: Vec<usize>,
    /// Its type in the file, where it is not what all have.
    dtype: Option<Dtype>,
    num_bytes: usize,
    content: Content<'f>,
}

enum Content<'f> {
    /// Of the decoder, as it was while training, with its update.
    Part(Part),
    /// Of a file, as it is but for its type.
    Copied(&'f TensorFile),
}

/// A merged folder before it is written.
pub struct MergedFolder<'m> {
    merge: &'m Merge<'m>,
    base: &'m WeightFiles,
    float: Float,
    shards: Vec<Vec<Tensor<'m>>>,
}

impl<'m> MergedFolder<'m> {
    /// Plans shards of at most `shard_bytes`. Without a `float`, it is what the base's files have.
    ///
    /// # Errors
    /// The base is a GGUF file, which no folder can be made of.
    pub fn plan(merge: &'m Merge<'m>, float: Option<Float>, shard_bytes: usize) -> Result<Self, ExportError> {
        let BaseFiles::Folder(base) = merge.files() else {
            return Err(ExportError::Impossible {
                problem: "the base is a GGUF file, and a Hugging Face folder cannot be made of one".into(),
                help: "name a file that ends in .gguf with --out, or the model's original folder with --base".into(),
            });
        };
        let config = merge.config();
        let parts = config.parts()?;
        let of_base = |part: &Part| base.tensors().find(|(name, _)| *name == base.name_of(part, config));
        let float = float
            .or_else(|| parts.iter().find_map(|part| Float::of(of_base(part)?.1.raw(of_base(part)?.0)?.0)))
            .unwrap_or(Float::Bf16);

        let mut planned = Vec::new();
        // matrices that are not copied, with whatever their quantization has put beside them
        let mut made: Vec<String> = Vec::new();
        for part in parts.into_iter().filter(|part| part.shape().len() == 2) {
            let name = base.name_of(&part, config);
            let is_float = of_base(&part).and_then(|(name, file)| Float::of(file.raw(name)?.0)).is_some();
            if !merge.is_adapted(&part) && part.kept() == Kept::Dense && is_float {
                continue;
            }
            made.push(name.clone());
            let shape = part.shape().to_vec();
            let num_bytes = shape.iter().product::<usize>() * float.num_bytes();
            planned.push(Tensor { name, shape, dtype: None, num_bytes, content: Content::Part(part) });
        }
        for (name, file) in base.tensors() {
            let beside = |made: &String| name.strip_prefix(made.as_str()).is_some_and(|rest| rest.starts_with('.'));
            // a tied head that is repeated would not be the embedding any more
            let repeated = config.tie_word_embeddings && name == "lm_head.weight";
            if repeated || made.iter().any(|made| made == name || beside(made)) {
                continue;
            }
            let Some((dtype, shape, bytes)) = file.raw(name) else { continue };
            let is_number = matches!(dtype, Dtype::F64) || Float::of(dtype).is_some();
            let elements: usize = shape.iter().product();
            planned.push(Tensor {
                name: name.to_owned(),
                shape: shape.to_vec(),
                dtype: (!is_number).then_some(dtype),
                num_bytes: if is_number { elements * float.num_bytes() } else { bytes.len() },
                content: Content::Copied(file),
            });
        }
        planned.sort_by(|one, two| natural(&one.name).cmp(&natural(&two.name)));
        let mut shards: Vec<Vec<Tensor<'m>>> = Vec::new();
        let mut filled = 0;
        for tensor in planned {
            if shards.is_empty() || filled + tensor.num_bytes > shard_bytes {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += tensor.num_bytes;
            shards.last_mut().expect("one was just begun").push(tensor);
        }
        Ok(Self { merge, base, float, shards })
    }

    /// The element type.
    #[must_use]
    pub fn float(&self) -> Float {
        self.float
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.shards.iter().flatten().map(|tensor| tensor.num_bytes).sum()
    }

    /// Writes the shards, their index, and what the base has beside its weights, into `folder`, which exists.
    ///
    /// # Errors
    /// A tensor is missing or broken, does not fit its type, or the system's.
    pub fn write(&self, folder: &Path, console: &Console) -> Result<(), ExportError> {
        let bar = console.bytes_bar("merging", self.num_bytes() as u64);
        let mut map = Map::new();
        for (number, shard) in self.shards.iter().enumerate() {
            let name = match self.shards.len() {
                1 => "model.safetensors".to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            let path = folder.join(name);
            let mut file = BufWriter::new(File::create(&path).map_err(cannot_write(&path))?);
            self.write_shard(shard, &path, &mut file, &bar)?;
            file.flush().map_err(cannot_write(&path))?;
        }
        if self.shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": self.num_bytes() }, "weight_map": map });
            files::write(&folder.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())?;
        }
        self.write_beside(folder)
    }

    fn write_shard(
        &self,
        shard: &[Tensor<'_>],
        path: &Path,
        file: &mut BufWriter<File>,
        bar: &Bar<'_>,
    ) -> Result<(), ExportError> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut start = 0;
        for Tensor { name, shape, dtype, num_bytes, .. } in shard {
            let dtype = dtype.map_or_else(|| self.float.in_file().to_owned(), |dtype| dtype.to_string());
            let end = start + num_bytes;
            header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
            start = end;
        }
        let mut header = Value::Object(header).to_string();
        // numbers begin where they can be read in place
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let write = |file: &mut BufWriter<File>, bytes: &[u8]| file.write_all(bytes).map_err(cannot_write(path));
        write(file, &(header.len() as u64).to_le_bytes())?;
        write(file, header.as_bytes())?;
        for tensor in shard {
            self.each_piece(tensor, |bytes| {
                bar.advance(bytes.len() as u64);
                Ok(write(file, bytes)?)
            })?;
        }
        Ok(())
    }

    /// The bytes of a tensor, so many at a time where it need not be whole.
    fn each_piece(
        &self,
        tensor: &Tensor<'_>,
        mut write: impl FnMut(&[u8]) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let mut encode = |values: &[f32]| {
            let bytes = self.float.encode(values).ok_or_else(|| ExportError::Values {
                tensor: tensor.name.clone(),
                problem: format!("values beyond {} do not fit {}", f16::MAX, self.float.name()),
                help: "write bf16 or f32: --type bf16",
            })?;
            write(&bytes)
        };
        match &tensor.content {
            Content::Part(part) if self.merge.is_adapted(part) => {
                encode(&self.merge.merged(part)?.flatten_all()?.to_vec1::<f32>()?)
            }
            Content::Part(part) => {
                let weight = self.merge.base(part)?;
                let (rows, columns) = weight.dims()?;
                let step = (PIECE / columns.max(1)).max(1);
                (0..rows).step_by(step).try_for_each(|row| encode(&dense_rows(&weight, row..(row + step).min(rows))?))
            }
            Content::Copied(file) => {
                let (dtype, shape, bytes) = file.raw(&tensor.name).unwrap_or((Dtype::U8, &[], &[]));
                if tensor.dtype.is_some() || Float::of(dtype) == Some(self.float) {
                    return bytes.chunks(PIECE).try_for_each(write);
                }
                let elements: usize = shape.iter().product();
                (0..elements).step_by(PIECE).try_for_each(|start| {
                    let part = start..(start + PIECE).min(elements);
                    let values = file.read_part(&tensor.name, shape, part);
                    encode(&values.map_err(crate::model::ModelError::from)?)
                })
            }
        }
    }

    /// Configuration, tokenizer, and whatever else of text stands beside the base's weights.
    fn write_beside(&self, folder: &Path) -> Result<(), ExportError> {
        let Some(base) = self.base.paths().next().and_then(Path::parent) else { return Ok(()) };
        copy_text_files(base, folder)?;
        let text = read_text(&base.join("config.json")).map_err(crate::model::ModelError::from)?;
        let config = serde_json::from_str(&text).unwrap_or(Value::Null);
        let config = self.configuration(config);
        Ok(files::write(&folder.join("config.json"), format!("{config:#}\n").as_bytes())?)
    }

    /// config.json, with the type that the weights have now.
    fn configuration(&self, mut config: Value) -> Value {
        let named = self.float.name();
        if let Some(config) = config.as_object_mut() {
            config.shift_remove("quantization_config");
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            config.insert(key.into(), json!(named));
            for part in config.values_mut().filter_map(Value::as_object_mut) {
                for key in ["dtype", "torch_dtype"] {
                    if let Some(dtype) = part.get_mut(key) {
                        *dtype = json!(named);
                    }
                }
            }
        }
        config
    }
}

/// Copies settings and tokenizer from beside a model's weights.
pub(crate) fn copy_text_files(from: &Path, to: &Path) -> Result<(), WriteError> {
    let entries = fs::read_dir(from).map_err(cannot_write(from))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let is_text = [".json", ".jinja", ".txt", ".model"].iter().any(|end| name.ends_with(end));
        // the index is of other shards, and what is of an adapter or a run is not of the model
        let is_other = name.ends_with(".index.json") || name.starts_with("adapter_");
        if is_text && !is_other && path.is_file() {
            let target = to.join(name);
            fs::copy(&path, &target).map_err(cannot_write(&target))?;
        }
    }
    Ok(())
}

/// For sorting: numbers in a name count as numbers, so that layer 10 comes after layer 9.
fn natural(name: &str) -> Vec<Result<usize, &str>> {
    name.split('.').map(|part| part.parse().map_err(|_| part)).collect()
}
