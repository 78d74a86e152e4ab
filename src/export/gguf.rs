//! GGUF files for llama.cpp: merged models, and adapters.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use candle_core::{DType, Tensor};
use half::f16;

use super::merge::dense_rows;
use super::{ExportError, Merge};
use crate::adapter::Adapters;
use crate::data::Codec;
use crate::files::{self, cannot_write};
use crate::gguf::{GgufFile, Header, TensorWriter, Value};
use crate::model::{BaseFiles, DecoderConfig, ModelError, Part, family};
use crate::progress::{Bar, Console};
use crate::quant::ggml::BlockType;
use crate::quant::{Kept, Quant, Weight, paired_row};

/// Numbers that are held at once while one tensor is written.
const PIECE: usize = 1 << 24;

/// What a GGUF file's metadata calls a mixture of types.
const FILE_TYPES: [(Quant, u64); 13] = [
    (Quant::None, 0),
    (Quant::F16, 1),
    (Quant::Q4_0, 2),
    (Quant::Q4_1, 3),
    (Quant::Q8_0, 7),
    (Quant::Q5_0, 8),
    (Quant::Q5_1, 9),
    (Quant::Q2K, 10),
    (Quant::Q3K, 11),
    (Quant::Q4K, 14),
    (Quant::Q5K, 16),
    (Quant::Q6K, 18),
    (Quant::Bf16, 32),
];

/// A merged model as a GGUF file, before it is written.
pub struct MergedGguf<'m> {
    merge: &'m Merge<'m>,
    codec: &'m Codec,
    metadata: Vec<(String, Value)>,
    tensors: Vec<Planned>,
    turned: bool,
}

/// One tensor of the file.
struct Planned {
    name: String,
    shape: Vec<usize>,
    kind: BlockType,
    content: Content,
}

enum Content {
    /// Of the decoder, as it was while training, with its update.
    Part(Part),
    /// Factors of rope.
    Vector(Vec<f32>),
}

impl<'m> MergedGguf<'m> {
    /// Plans a file whose linear modules are of `quant`: [`Quant::None`] is f32. It gets the tokenizer and chat template of
    /// `codec` and calls itself `name`.
    ///
    /// # Errors
    /// GGUF has no such type, or no place for the tokenizer.
    pub fn plan(merge: &'m Merge<'m>, codec: &'m Codec, name: &str, quant: Quant) -> Result<Self, ExportError> {
        let config = merge.config();
        let Some((_, file_type)) = FILE_TYPES.iter().find(|(known, _)| *known == quant) else {
            return Err(ExportError::Impossible {
                problem: format!("GGUF files have no {}", quant.name()),
                help: "q4_k is as small; --type q4_k".into(),
            });
        };
        let mut metadata: Vec<(String, Value)> = Vec::new();
        let mut vectors = Vec::new();
        let architecture = match merge.files() {
            BaseFiles::Folder(files) => {
                let described = family::describe(config);
                metadata.push(("general.architecture".into(), described.architecture.into()));
                metadata.push(("general.type".into(), "model".into()));
                metadata.extend(described.metadata);
                let tokenizer = files.paths().next().unwrap_or(Path::new("")).with_file_name("tokenizer.json");
                metadata.extend(codec.gguf_metadata(config.vocab_size, &tokenizer)?);
                vectors.extend(described.tensors.into_iter().map(|(name, values)| (name.to_owned(), values)));
                described.architecture.to_owned()
            }
            // what it says of itself stays, but for what does not hold any more
            BaseFiles::Gguf(file) => {
                const OTHER: [&str; 5] = [
                    "general.file_type",
                    "general.alignment",
                    "general.name",
                    "general.quantization_version",
                    "tokenizer.chat_template",
                ];
                let stays = |key: &str| {
                    !OTHER.contains(&key) && !["split.", "quantize."].iter().any(|of| key.starts_with(of))
                };
                let kept = file.all_metadata().filter(|(key, _)| stays(key));
                metadata.extend(kept.map(|(key, value)| (key.to_owned(), value.clone())));
                if let Some(template) = codec.chat_template() {
                    metadata.push(("tokenizer.chat_template".into(), template.into()));
                }
                for (name, info) in file.tensors().filter(|(name, _)| name.starts_with("rope_f")) {
                    let values = file.vector(name, info.shape.iter().product());
                    vectors.push((name.to_owned(), values.map_err(ModelError::from)?));
                }
                file.metadata("general.architecture").and_then(Value::as_str).unwrap_or_default().to_owned()
            }
        };
        metadata.push(("general.name".into(), name.into()));
        metadata.push(("general.file_type".into(), Value::Unsigned(*file_type)));
        metadata.push(("general.quantization_version".into(), Value::Unsigned(2)));

        let mut tensors: Vec<Planned> = Vec::new();
        for (name, values) in vectors {
            let shape = vec![values.len()];
            tensors.push(Planned { name, shape, kind: BlockType::F32, content: Content::Vector(values) });
        }
        for part in config.parts()? {
            let kind = match part.shape() {
                [_, columns] if part.is_vocabulary() => quant.of_embedding(*columns),
                [_, columns] => quant.of_linear(*columns),
                _ => Kept::Dense,
            };
            let kind = match kind {
                Kept::Blocks(kind) => kind,
                Kept::Dense | Kept::Nf4 => BlockType::F32,
            };
            let shape = part.shape().to_vec();
            tensors.push(Planned { name: part.gguf_name(), shape, kind, content: Content::Part(part) });
        }
        Ok(Self { merge, codec, metadata, tensors, turned: family::is_paired(&architecture) })
    }

    fn header(&self) -> Result<Header, ExportError> {
        let mut header = Header::default();
        for (key, value) in &self.metadata {
            header.value(key, value.clone());
        }
        for Planned { name, shape, kind, .. } in &self.tensors {
            header.tensor(name, shape, *kind).map_err(|problem| ExportError::Values {
                tensor: name.clone(),
                problem,
                help: "--type f16 takes rows of any length",
            })?;
        }
        Ok(header)
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// A tensor does not fit its type.
    pub fn num_bytes(&self) -> Result<usize, ExportError> {
        Ok(self.header()?.num_bytes())
    }

    /// Writes the file, once a reader makes of its header what it was written of. What llama.cpp will compute otherwise, and
    /// is no reason not to write it, is told.
    ///
    /// # Errors
    /// A tensor is broken or does not fit its type, the file would not say what the model is, or the system's.
    pub fn write(&self, path: &Path, console: &Console) -> Result<(), ExportError> {
        files::write_at(path, |partial| {
            let header = self.header()?;
            let (length, tensors) = (header.num_bytes(), header.tensors().map(|(_, bytes)| bytes as u64).sum());
            // first without a weight, so that nobody waits for hours to be told what could be known before
            let is_vector = |tensor: &&Planned| matches!(tensor.content, Content::Vector(_));
            let vectors = self.tensors.iter().take_while(is_vector);
            let begun = self.write_tensors(header, vectors, partial, path, &Console::silent().bytes_bar("", 0))?;
            let fill_up = || begun.stop()?.into_inner()?.set_len(length as u64);
            fill_up().map_err(cannot_write(path))?;
            self.check(partial, console)?;
            let bar = console.bytes_bar("merging", tensors);
            let written = self.write_tensors(self.header()?, self.tensors.iter(), partial, path, &bar)?;
            Ok(written.finish().map_err(cannot_write(path))?)
        })
    }

    /// Writes the header and the first of the tensors, or all of them.
    fn write_tensors<'t>(
        &self,
        header: Header,
        tensors: impl Iterator<Item = &'t Planned>,
        partial: &Path,
        path: &Path,
        bar: &Bar<'_>,
    ) -> Result<TensorWriter<BufWriter<File>>, ExportError> {
        let file = BufWriter::new(File::create(partial).map_err(cannot_write(path))?);
        let mut writer = header.write(file).map_err(cannot_write(path))?;
        for tensor in tensors {
            self.each_piece(tensor, |bytes| {
                bar.advance(bytes.len() as u64);
                Ok(writer.put(bytes).map_err(cannot_write(path))?)
            })?;
        }
        Ok(writer)
    }

    /// Whether a reader makes of the file what it was written of.
    fn check(&self, file: &Path, console: &Console) -> Result<(), ExportError> {
        const HELP: &str = "merge to a Hugging Face folder and convert that with llama.cpp's convert_hf_to_gguf.py";
        let lost = |what: &str| ExportError::Impossible {
            problem: format!("a GGUF file of this model would not say {what} as the model has it"),
            help: HELP.into(),
        };
        let read = family::read_gguf(&GgufFile::open(file).map_err(ModelError::from)?)?;
        if let Some(what) = family::difference(self.merge.config(), &read) {
            return Err(lost(what));
        }
        let windows = |config: &DecoderConfig| config.layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
        if windows(self.merge.config()) != windows(&read) {
            console.warning(
                "llama.cpp knows no sliding window of this architecture: it will compute texts longer than the window otherwise",
            );
        }
        let codec = Codec::open(file, None).map_err(|_| lost("how text becomes tokens"))?;
        match self.codec.first_difference(&codec) {
            Some(text) => Err(lost(&format!("how {text:?} becomes tokens"))),
            None => Ok(()),
        }
    }

    /// The bytes of a tensor in the file's order of rows, so many at a time where it need not be whole.
    fn each_piece(
        &self,
        tensor: &Planned,
        mut write: impl FnMut(&[u8]) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let part = match &tensor.content {
            Content::Vector(values) => return write(&tensor.kind.quantize(values)),
            Content::Part(part) => part,
        };
        let head_dim = self.merge.config().head_dim;
        let turned = (self.turned && part.is_turned()).then_some(head_dim);
        let (rows, columns) = match part.shape() {
            [rows, columns] => (*rows, *columns),
            shape => (shape.iter().product(), 1),
        };
        let mut encode = |mut values: Vec<f32>| {
            if let Some(head_dim) = turned {
                values = turn(&values, columns, head_dim);
            }
            if tensor.kind == BlockType::F16 && values.iter().any(|&x| f16::from_f32(x).is_infinite()) {
                return Err(ExportError::Values {
                    tensor: tensor.name.clone(),
                    problem: format!("values beyond {} do not fit f16", f16::MAX),
                    help: "write bf16: --type bf16",
                });
            }
            write(&tensor.kind.quantize(&values))
        };
        if self.merge.is_adapted(part) {
            return encode(self.merge.merged(part)?.flatten_all()?.to_vec1()?);
        }
        match self.merge.base(part)? {
            Weight::Quantized(quantized) => {
                if let Some(bytes) = quantized.blocks(tensor.kind, turned) {
                    // as they are: quantized once more they would not come out the same
                    return bytes.chunks(PIECE).try_for_each(write);
                }
                let weight = Weight::Quantized(quantized);
                let step = (PIECE / columns.max(1)).max(1).next_multiple_of(head_dim);
                let mut starts = (0..rows).step_by(step);
                starts.try_for_each(|row| encode(dense_rows(&weight, row..(row + step).min(rows))?))
            }
            Weight::Dense(tensor) => encode(tensor.flatten_all()?.to_vec1()?),
            #[cfg(feature = "cuda")]
            Weight::OnDevice(resident) => encode(resident.dense(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }
}

/// Rows in the order that llama.cpp has them in.
fn turn(values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let mut turned = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(columns).enumerate() {
        turned[paired_row(row, head_dim) * columns..][..columns].copy_from_slice(values);
    }
    turned
}

/// An adapter as llama.cpp's `convert_lora_to_gguf.py` writes it.
///
/// The file has one `alpha` for all modules, and llama.cpp scales each by `alpha / rank`; where that is not the module's
/// scale, the difference goes into its `B`.
pub struct LoraGguf {
    header: Header,
    tensors: Vec<Tensor>,
}

impl LoraGguf {
    /// Plans a file that calls itself `name`.
    ///
    /// # Errors
    /// DoRA, for which llama.cpp has no place.
    pub fn plan(adapters: &Adapters, config: &DecoderConfig, name: &str) -> Result<Self, ExportError> {
        if adapters.config().dora {
            return Err(ExportError::Impossible {
                problem: "GGUF adapters have no place for DoRA's magnitudes".into(),
                help: "merge it: dpo-lora merge".into(),
            });
        }
        let architecture = family::describe(config).architecture;
        let alpha = adapters.iter().map(|lora| lora.scale() * lora.rank() as f64).next().unwrap_or(1.0) as f32;
        let mut header = Header::default();
        header.value("general.architecture", architecture.into());
        header.value("general.type", "adapter".into());
        header.value("general.name", name.into());
        header.value("general.file_type", Value::Unsigned(0));
        header.value("adapter.type", "lora".into());
        header.value("adapter.lora.alpha", f64::from(alpha).into());
        let mut tensors = Vec::new();
        for part in config.parts()? {
            let Some(lora) = part.module().and_then(|module| adapters.get(module)) else { continue };
            let by = lora.scale() * lora.rank() as f64 / f64::from(alpha);
            let b = lora.b().to_dtype(DType::F64)?;
            // a scale that is the file's already is not rounded once more
            let b = if (by - 1.0).abs() < 1e-7 { b } else { (b * by)? }.to_dtype(DType::F32)?;
            let b = match family::is_paired(architecture) && part.is_turned() {
                true => Tensor::from_vec(
                    turn(&b.flatten_all()?.to_vec1::<f32>()?, lora.rank(), config.head_dim),
                    b.dims(),
                    b.device(),
                )?,
                false => b,
            };
            for (end, tensor) in [("lora_a", lora.a().to_dtype(DType::F32)?), ("lora_b", b)] {
                let name = format!("{}.{end}", part.gguf_name());
                // of f32 every row is whole
                let _ = header.tensor(name, tensor.dims(), BlockType::F32);
                tensors.push(tensor);
            }
        }
        Ok(Self { header, tensors })
    }

    /// Writes the file, all of it or none.
    ///
    /// # Errors
    /// The system's.
    pub fn write(self, path: &Path) -> Result<(), ExportError> {
        files::write_with(path, |file| {
            let mut writer = self.header.write(file).map_err(cannot_write(path))?;
            for tensor in &self.tensors {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                writer.put(&BlockType::F32.quantize(&values)).map_err(cannot_write(path))?;
            }
            Ok(writer.finish().map_err(cannot_write(path))?)
        })
    }
}
