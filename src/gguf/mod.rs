//! GGUF files, read by memory map and as hostile: nothing is believed before it is checked, nothing is allocated because a
//! file claims it. Versions 2 and 3, little-endian.

mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
pub use write::{Header, TensorWriter};

use crate::quant::ggml::BlockType;
use crate::quant::{Bytes, Quantized};
use crate::tensor_file::{LFS_HELP, TensorFileError, describe_io, is_lfs_pointer};

/// Where tensors begin at multiples of, if the file does not say.
const ALIGNMENT: usize = 32;
/// Values of an array of the metadata: a hundred times the largest vocabulary. In memory each takes more than in the file.
const LONGEST: u64 = 1 << 25;
/// Bytes that are hashed at once.
const PIECE: usize = 16 << 20;

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// A text.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

/// Where a tensor is, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Rows first.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub kind: BlockType,
    /// Its bytes in the file.
    bytes: Range<usize>,
}

impl TensorInfo {
    /// Length in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl Value {
    /// A whole number that is not negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(*number),
            Self::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A number.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(number) => Some(*number as f64),
            Self::Signed(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// A text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A flag.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// Values of one type.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }
}

impl GgufFile {
    /// Opens a file and checks all of its header against its length.
    ///
    /// # Errors
    /// The file is missing, a Git-LFS pointer, truncated, or no GGUF file that can be read.
    pub fn open(path: &Path) -> Result<Self, TensorFileError> {
        let error = |problem: String, help: Option<&str>| TensorFileError {
            file: path.to_owned(),
            problem,
            help: help.map(ToOwned::to_owned),
        };
        let file = File::open(path).map_err(|e| error(describe_io(&e), None))?;
        if is_lfs_pointer(path) {
            return Err(error("is a Git-LFS pointer, not the file itself".into(), Some(LFS_HELP)));
        }
        // SAFETY: as for safetensors: the map is read only, its bytes are only ever read as numbers, and another process that
        // truncates the file ends this one with a signal.
        #[expect(unsafe_code, reason = "memory-mapping a model file")]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| error(describe_io(&e), None))?;
        let (metadata, tensors) =
            Reader { bytes: &map, at: 0 }.header().map_err(|Broken { problem, truncated }| {
                let help = if truncated {
                    "the download or copy did not finish; fetch the file again"
                } else {
                    "fetch the file again"
                };
                error(problem, Some(help))
            })?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map), metadata, tensors })
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.map.len()
    }

    /// The file's bytes, in pieces of a size that a progress bar can show.
    pub fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        self.map.chunks(PIECE)
    }

    /// A value of the metadata.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All of the metadata.
    pub fn all_metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// A tensor, if it is there.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A tensor's bytes as they are in the file.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<&[u8]> {
        self.map.get(self.tensor(name)?.bytes.clone())
    }

    /// A matrix in its blocks, which stay in the file.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn matrix(&self, name: &str, [rows, columns]: [usize; 2]) -> Result<Quantized, TensorFileError> {
        let info = self.expect(name, &[rows, columns])?;
        let bytes = Bytes::Mapped(Arc::clone(&self.map), info.bytes.clone());
        Quantized::ggml(rows, columns, info.kind, bytes)
            .map_err(|problem| self.error(format!("tensor `{name}`: {problem}")))
    }

    /// The values of a vector.
    ///
    /// # Errors
    /// It is missing or has another length.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, TensorFileError> {
        let info = self.expect(name, &[len])?;
        let bytes = Bytes::Mapped(Arc::clone(&self.map), info.bytes.clone());
        let row = Quantized::ggml(1, len, info.kind, bytes)
            .map_err(|problem| self.error(format!("tensor `{name}`: {problem}")))?;
        let mut values = vec![0.0; len];
        row.row(0, &mut values);
        Ok(values)
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo, TensorFileError> {
        let info = self.tensors.get(name).ok_or_else(|| self.error(format!("has no tensor `{name}`")))?;
        if info.shape != shape {
            return Err(
                self.error(format!("tensor `{name}` is {:?}, not {shape:?} as the metadata gives it", info.shape))
            );
        }
        Ok(info)
    }

    /// What is wrong with this file.
    pub(crate) fn error(&self, problem: String) -> TensorFileError {
        TensorFileError { file: self.path.clone(), problem, help: None }
    }
}

/// Why a header cannot be read.
struct Broken {
    problem: String,
    /// The file ends before what it speaks of.
    truncated: bool,
}

impl From<String> for Broken {
    fn from(problem: String) -> Self {
        Self { problem, truncated: false }
    }
}

type Read<T> = Result<T, Broken>;
type Entries = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Reader<'b> {
    fn header(mut self) -> Read<Entries> {
        if self.bytes.get(..4) != Some(b"GGUF") {
            return Err("is no GGUF file: it does not begin with `GGUF`".to_owned().into());
        }
        self.at = 4;
        let version = self.number::<4, u32>("the version", u32::from_le_bytes)?;
        if !(2..=3).contains(&version) {
            let big = if version.swap_bytes() <= 3 { " (it is big-endian)" } else { "" };
            return Err(format!("is GGUF of version {version}{big}; 2 and 3 can be read").into());
        }
        let tensors = self.u64("the number of tensors")?;
        let values = self.u64("the number of metadata values")?;
        // each entry takes so many bytes at the least, which have to be there
        for (what, count, least) in [("tensors", tensors, 32), ("metadata values", values, 13)] {
            if count > (self.bytes.len() / least) as u64 {
                let problem =
                    format!("is cut short: {} bytes are there, and it speaks of {count} {what}", self.bytes.len());
                return Err(Broken { problem, truncated: true });
            }
        }
        let mut metadata = BTreeMap::new();
        for i in 0..values {
            let key = self.text(&format!("the key of metadata value {i}"))?.to_owned();
            let what = format!("metadata `{key}`");
            let kind = self.u32(&what)?;
            let value = self.value(kind, &what, true)?;
            if metadata.insert(key, value).is_some() {
                return Err(format!("{what} is there twice").into());
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => {
                let given = value.as_u64().filter(|n| n.is_power_of_two() && (8..=1 << 20).contains(n));
                given
                    .ok_or_else(|| format!("metadata `general.alignment` is {value:?}, no power of two from 8 on"))?
                    as usize
            }
        };
        let mut infos = Vec::new();
        for i in 0..tensors {
            infos.push(self.tensor(i)?);
        }
        let start = self.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, TensorInfo { shape, kind, bytes }) in infos {
            let what = format!("tensor `{name}`");
            if !bytes.start.is_multiple_of(alignment) {
                return Err(format!("{what} begins at {}, no multiple of {alignment}", bytes.start).into());
            }
            let end = start.checked_add(bytes.end).filter(|&end| end <= self.bytes.len());
            let Some(end) = end else {
                return Err(Broken {
                    problem: format!("is cut short: {what} ends after the file's {} bytes", self.bytes.len()),
                    truncated: true,
                });
            };
            if tensors.insert(name, TensorInfo { shape, kind, bytes: start + bytes.start..end }).is_some() {
                return Err(format!("{what} is there twice").into());
            }
        }
        Ok((metadata, tensors))
    }

    /// A tensor's name and what it is; its bytes are counted from the first of all tensors.
    fn tensor(&mut self, i: u64) -> Read<(String, TensorInfo)> {
        let name = self.text(&format!("the name of tensor {i}"))?.to_owned();
        let what = format!("tensor `{name}`");
        let dimensions = self.u32(&what)?;
        if !(1..=4).contains(&dimensions) {
            return Err(format!("{what} has {dimensions} dimensions").into());
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            shape.push(usize::try_from(size).map_err(|_| format!("{what} has a dimension of {size}"))?);
        }
        // columns come first in the file
        shape.reverse();
        let number = self.u32(&what)?;
        let kind = BlockType::ALL.iter().find(|(n, _, _)| *n == number).map(|(_, _, kind)| *kind);
        let kind = kind.ok_or_else(|| {
            let known = BlockType::ALL.map(|(_, name, _)| name).join(", ");
            format!("{what} is of type {}, which is not supported; supported: {known}", name_of(number))
        })?;
        let offset = self.u64(&what)?;
        let size = || {
            let of_row = kind.row_bytes(*shape.last()?)?;
            let bytes = shape[..shape.len() - 1].iter().try_fold(of_row, |bytes, &n| bytes.checked_mul(n))?;
            let start = usize::try_from(offset).ok()?;
            Some(start..start.checked_add(bytes)?)
        };
        let bytes = size().ok_or_else(|| format!("{what} cannot be {shape:?} in {kind} at {offset}"))?;
        Ok((name, TensorInfo { shape, kind, bytes }))
    }

    fn value(&mut self, kind: u32, what: &str, arrays: bool) -> Read<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.number::<1, u8>(what, u8::from_le_bytes)?.into()),
            1 => Value::Signed(self.number::<1, i8>(what, i8::from_le_bytes)?.into()),
            2 => Value::Unsigned(self.number::<2, u16>(what, u16::from_le_bytes)?.into()),
            3 => Value::Signed(self.number::<2, i16>(what, i16::from_le_bytes)?.into()),
            4 => Value::Unsigned(self.u32(what)?.into()),
            5 => Value::Signed(self.number::<4, i32>(what, i32::from_le_bytes)?.into()),
            6 => Value::Float(self.number::<4, f32>(what, f32::from_le_bytes)?.into()),
            7 => match self.number::<1, u8>(what, u8::from_le_bytes)? {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(format!("{what} is a flag of {other}").into()),
            },
            8 => Value::Text(self.text(what)?.to_owned()),
            9 if arrays => {
                let kind = self.u32(what)?;
                let length = self.u64(what)?;
                if length > LONGEST {
                    let problem = format!("{what} has {length} values; no more than {LONGEST} are read");
                    return Err(Broken { problem, truncated: length > self.bytes.len() as u64 });
                }
                let mut values = Vec::new();
                for _ in 0..length {
                    values.push(self.value(kind, what, false)?);
                }
                Value::Array(values)
            }
            9 => return Err(format!("{what} is an array of arrays").into()),
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(self.number::<8, i64>(what, i64::from_le_bytes)?),
            12 => Value::Float(self.number::<8, f64>(what, f64::from_le_bytes)?),
            other => return Err(format!("{what} is of type {other}, which there is not").into()),
        })
    }

    fn take(&mut self, length: usize, what: &str) -> Read<&'b [u8]> {
        let bytes = self.at.checked_add(length).and_then(|end| self.bytes.get(self.at..end));
        let bytes = bytes.ok_or_else(|| Broken {
            problem: format!("is cut short: {} bytes are there, and {what} goes on", self.bytes.len()),
            truncated: true,
        })?;
        self.at += length;
        Ok(bytes)
    }

    fn number<const N: usize, T>(&mut self, what: &str, number: impl Fn([u8; N]) -> T) -> Read<T> {
        let bytes = self.take(N, what)?;
        Ok(number(bytes.try_into().unwrap_or([0; N])))
    }

    fn u32(&mut self, what: &str) -> Read<u32> {
        self.number(what, u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Read<u64> {
        self.number(what, u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Read<&'b str> {
        let length = self.u64(what)?;
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX), what)?;
        std::str::from_utf8(bytes).map_err(|_| format!("{what} is no UTF-8 text").into())
    }
}

/// What llama.cpp calls a type that is not read here.
fn name_of(number: u32) -> String {
    const NAMES: [(u32, &str); 16] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (26, "I32"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (39, "MXFP4"),
    ];
    NAMES.iter().find(|(n, _)| *n == number).map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A GGUF file in memory.
    #[derive(Default)]
    pub(crate) struct Writer {
        header: Header,
        data: Vec<Vec<u8>>,
    }

    impl Writer {
        pub(crate) fn value(mut self, key: &str, value: Value) -> Self {
            self.header.value(key, value);
            self
        }

        pub(crate) fn tensor(mut self, name: &str, shape: &[usize], kind: BlockType, values: &[f32]) -> Self {
            self.header.tensor(name, shape, kind).expect("it fits");
            self.data.push(kind.quantize(values));
            self
        }

        pub(crate) fn bytes(self) -> Vec<u8> {
            let mut bytes = Vec::new();
            let mut writer = self.header.write(&mut bytes).expect("written");
            self.data.iter().for_each(|data| writer.put(data).expect("as many as announced"));
            writer.finish().expect("whole");
            bytes
        }
    }

    fn open(bytes: &[u8]) -> Result<GgufFile, TensorFileError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).expect("written");
        GgufFile::open(&path)
    }

    fn sample() -> Writer {
        let texts = ["a", "ß"].map(|text| Value::Text(text.into()));
        Writer::default()
            .value("general.architecture", Value::Text("llama".into()))
            .value("llama.block_count", Value::Unsigned(2))
            .value("x.flag", Value::Bool(true))
            .value("x.number", Value::Float(0.5))
            .value("x.list", Value::Array(texts.into()))
            .tensor("norm", &[3], BlockType::F32, &[1.0, 2.0, 3.0])
            .tensor("matrix", &[2, 32], BlockType::Q8_0, &[0.25; 64])
    }

    #[test]
    fn what_is_written_is_read() {
        let file = open(&sample().bytes()).expect("a file");
        assert_eq!(file.metadata("general.architecture").and_then(Value::as_str), Some("llama"));
        assert_eq!(file.metadata("llama.block_count").and_then(Value::as_u64), Some(2));
        assert_eq!(file.metadata("x.flag").and_then(Value::as_bool), Some(true));
        assert_eq!(file.metadata("x.number").and_then(Value::as_f64), Some(0.5));
        assert_eq!(file.metadata("x.list").and_then(Value::as_array).map(<[_]>::len), Some(2));
        assert_eq!(file.vector("norm", 3).expect("a vector"), [1.0, 2.0, 3.0]);
        let matrix = file.matrix("matrix", [2, 32]).expect("a matrix");
        let mut row = [0.0; 32];
        matrix.row(1, &mut row);
        assert!(row.iter().all(|x| (x - 0.25).abs() < 1e-3), "{row:?}");
        let problem = file.matrix("matrix", [32, 2]).expect_err("another shape").problem;
        assert!(problem.contains("`matrix` is [2, 32], not [32, 2]"), "{problem}");
        assert!(file.vector("other", 1).expect_err("none").problem.contains("has no tensor `other`"));
    }

    #[test]
    fn wherever_it_ends_it_is_said_to_be_cut_short() {
        let whole = sample().bytes();
        let data = whole.len() - 32 - 96;
        for length in 8..data + 12 {
            let error = open(&whole[..length]).expect_err("cut short");
            assert!(error.problem.contains("is cut short"), "{length}: {}", error.problem);
            assert!(error.help.is_some_and(|help| help.contains("did not finish")));
        }
        assert!(open(b"").is_err());
        assert!(open(b"GGML....").expect_err("another").problem.contains("no GGUF file"));
    }

    #[test]
    fn claims_are_not_believed() {
        let claim = |at: usize, value: u64| {
            let mut bytes = sample().bytes();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            open(&bytes).expect_err("too much").problem
        };
        // tensors, metadata values, the length of the first key
        for at in [8, 16, 24] {
            for value in [1 << 60, u64::MAX, u64::MAX / 2 + 1] {
                assert!(claim(at, value).contains("is cut short"), "{at} {value}");
            }
        }
        let mut bytes = sample().bytes();
        let at = bytes.windows(6).position(|w| w == b"matrix").expect("its name") + 6 + 4;
        bytes[at..at + 8].copy_from_slice(&(1u64 << 63).to_le_bytes());
        let problem = open(&bytes).expect_err("it overflows").problem;
        assert!(problem.contains("tensor `matrix` cannot be"), "{problem}");
        let of_type = |number: u32| {
            let mut bytes = sample().bytes();
            bytes[at + 16..at + 20].copy_from_slice(&number.to_le_bytes());
            open(&bytes).expect_err("not read").problem
        };
        assert!(of_type(23).contains("tensor `matrix` is of type IQ4_XS, which is not supported"), "{}", of_type(23));
    }

    proptest! {
        #[test]
        fn flipped_bits_never_panic(flips in proptest::collection::vec((0usize..400, 0u8..8), 1..4)) {
            let mut bytes = sample().bytes();
            for (at, bit) in flips {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
            }
            if let Ok(file) = open(&bytes) {
                let _ = file.vector("norm", 3);
                let _ = file.matrix("matrix", [2, 32]).map(|m| m.row(1, &mut [0.0; 32]));
            }
        }
    }
}
