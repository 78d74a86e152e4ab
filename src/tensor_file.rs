//! Safetensors files, read by memory map and as hostile: nothing is believed before it is checked, nothing is allocated
//! because a file claims it.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use miette::Diagnostic;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors};
use thiserror::Error;

/// Bytes of a file that are held in memory at once while it is read.
const PIECE: usize = 16 << 20;

/// What can be wrong with a tensor file.
#[derive(Debug, Error, Diagnostic)]
#[error("{}: {problem}", file.display())]
pub struct TensorFileError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: String,
    /// What to do.
    #[help]
    pub help: Option<String>,
}

/// An open safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where tensor data begins.
    data_start: usize,
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// The file is missing, a Git-LFS pointer, truncated, or no safetensors file.
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
        // SAFETY: the map is read only. Another process that truncates the file while it is mapped would end this one
        // with a signal, which is the price every mapped model file pays; nothing here is made unsound by changed bytes,
        // as they are only ever read as numbers.
        #[expect(unsafe_code, reason = "memory-mapping a model file")]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| error(describe_io(&e), None))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| match e {
            SafeTensorError::HeaderTooSmall
            | SafeTensorError::InvalidHeaderLength
            | SafeTensorError::MetadataIncompleteBuffer => error(
                format!("is cut short: {} bytes are there and the header speaks of more", map.len()),
                Some("the download or copy did not finish; fetch the file again"),
            ),
            other => error(format!("is no valid safetensors file ({other})"), Some("fetch the file again")),
        })?;
        Ok(Self { path: path.to_owned(), map, metadata, data_start: header + 8 })
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
        self.map.chunks(PIECE).enumerate().inspect(|(i, _)| self.release(0..i * PIECE)).map(|(_, piece)| piece)
    }

    /// Numbers of `N` bytes each.
    fn convert<const N: usize>(&self, bytes: Range<usize>, number: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
        let mut converted = Vec::with_capacity(bytes.len() / N);
        for start in bytes.clone().step_by(PIECE) {
            let piece = start..(start + PIECE).min(bytes.end);
            let (numbers, _) = self.map[piece.clone()].as_chunks::<N>();
            converted.par_extend(numbers.par_iter().with_min_len(1 << 16).map(|&bytes| number(bytes)));
            self.release(piece);
        }
        converted
    }

    /// Gives the memory of bytes that were read back to the system, which reads them from the file again if need be.
    /// Otherwise the process would hold the whole file besides the tensors made of it.
    fn release(&self, bytes: Range<usize>) {
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is of a file and read only, so that pages dropped are the same when they come again.
            #[expect(
                unsafe_code,
                reason = "for maps that can be written to, this advice would lose what was written"
            )]
            let advised = unsafe { self.map.unchecked_advise_range(DontNeed, bytes.start, bytes.len()) };
            // it is only advice
            let _ = advised;
        }
    }

    /// Names of all tensors, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of a tensor, if it is there.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Bytes that a tensor takes in the file; 0 where it is not there.
    #[must_use]
    pub fn tensor_bytes(&self, name: &str) -> usize {
        self.metadata.info(name).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0)
    }

    /// Element type, shape and bytes of a tensor as the file has it; none where it is not there.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<(Dtype, &[usize], &[u8])> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        Some((info.dtype, &info.shape, &self.map[self.data_start + start..self.data_start + end]))
    }

    /// The bytes of a tensor of bytes; none where it is not there, or holds something else.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let info = self.metadata.info(name).filter(|info| info.dtype == Dtype::U8)?;
        let (start, end) = info.data_offsets;
        Some(&self.map[self.data_start + start..self.data_start + end])
    }

    /// A tensor of the shape asked for, as `dtype` (F32 or F64) on the CPU.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or holds something else than F32, F16, BF16 or F64.
    pub fn read(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor, TensorFileError> {
        let values = self.read_f32(name, shape)?;
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype));
        tensor.map_err(|e| TensorFileError {
            file: self.path.clone(),
            problem: format!("tensor `{name}`: {e}"),
            help: None,
        })
    }

    /// The values of a tensor of the shape asked for.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, TensorFileError> {
        self.read_part(name, shape, 0..shape.iter().product())
    }

    /// Some of the values of a tensor of the shape asked for, one after the other from its first.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    ///
    /// # Panics
    /// `elements` are more than `shape` has.
    pub fn read_part(
        &self,
        name: &str,
        shape: &[usize],
        elements: Range<usize>,
    ) -> Result<Vec<f32>, TensorFileError> {
        let error = |problem: String, help: Option<&str>| TensorFileError {
            file: self.path.clone(),
            problem,
            help: help.map(ToOwned::to_owned),
        };
        let Some(info) = self.metadata.info(name) else {
            return Err(error(format!("has no tensor `{name}`"), None));
        };
        if info.shape != shape {
            let help = "the file belongs to a model of another size than its config says";
            return Err(error(format!("tensor `{name}` is {:?}, not {shape:?}", info.shape), Some(help)));
        }
        // the header check has bound the offsets by the length of the map, and their distance by shape and type
        let start = self.data_start + info.data_offsets.0;
        assert!(elements.end <= shape.iter().product(), "a part of a tensor ends where the tensor does");
        let bytes = |size: usize| start + size * elements.start..start + size * elements.end;
        match info.dtype {
            Dtype::F32 => Ok(self.convert(bytes(4), |b: [u8; 4]| f32::from_le_bytes(b))),
            Dtype::F16 => Ok(self.convert(bytes(2), |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Ok(self.convert(bytes(2), |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f32())),
            Dtype::F64 => Ok(self.convert(bytes(8), |b: [u8; 8]| f64::from_le_bytes(b) as f32)),
            other => {
                let help = "weights are read from F32, F16, BF16 and F64; load the original, not a quantized copy";
                Err(error(format!("tensor `{name}` holds {other:?}"), Some(help)))
            }
        }
    }
}

pub(crate) const LFS_HELP: &str = "run `git lfs pull` in that folder, or fetch the file from the hub";

/// Whether a file is the small text file that Git leaves where large-file storage was not fetched.
#[must_use]
pub fn is_lfs_pointer(path: &Path) -> bool {
    let mut start = [0; 43];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
        && start.starts_with(b"version https://git-lfs.github.com/spec/v1")
}

/// A short description of why a file could not be read, without the path, which the caller has.
#[must_use]
pub fn describe_io(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "does not exist".into(),
        std::io::ErrorKind::PermissionDenied => "may not be read (permission denied)".into(),
        std::io::ErrorKind::IsADirectory => "is a folder, not a file".into(),
        std::io::ErrorKind::StorageFull => "could not be written: the disk is full".into(),
        _ => error.to_string(),
    }
}

/// Reads a text file that a model or adapter folder must have, with the same care for LFS pointers.
///
/// # Errors
/// The file is missing, a Git-LFS pointer, or not UTF-8.
pub fn read_text(path: &Path) -> Result<String, TensorFileError> {
    let error = |problem: String, help: Option<&str>| TensorFileError {
        file: path.to_owned(),
        problem,
        help: help.map(ToOwned::to_owned),
    };
    if is_lfs_pointer(path) {
        return Err(error("is a Git-LFS pointer, not the file itself".into(), Some(LFS_HELP)));
    }
    std::fs::read_to_string(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => error("is not UTF-8 text".into(), None),
        _ => error(describe_io(&e), None),
    })
}
