//! GGUF files, written one tensor after the other: version 3, little-endian.

use std::io::{self, Write};

use super::{ALIGNMENT, Value};
use crate::quant::ggml::BlockType;

/// What stands before the tensors: metadata, and which tensors there are.
#[derive(Debug, Default)]
pub struct Header {
    metadata: Vec<(String, Value)>,
    /// Name, shape with rows first, type, and bytes.
    tensors: Vec<(String, Vec<usize>, BlockType, usize)>,
}

impl Header {
    /// Adds a value of the metadata.
    pub fn value(&mut self, key: impl Into<String>, value: Value) {
        self.metadata.push((key.into(), value));
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// Rows are no whole number of blocks, or there is no dimension.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize], kind: BlockType) -> Result<(), String> {
        let name = name.into();
        let bytes = shape.split_last().and_then(|(&columns, rows)| {
            rows.iter().try_fold(kind.row_bytes(columns)?, |bytes, &rows| bytes.checked_mul(rows))
        });
        let bytes = bytes.ok_or_else(|| format!("tensor `{name}` cannot be {shape:?} in {kind}"))?;
        self.tensors.push((name, shape.to_vec(), kind, bytes));
        Ok(())
    }

    /// The tensors' names and bytes, in order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|(name, _, _, bytes)| (name.as_str(), *bytes))
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let tensors = self.tensors.iter().map(|(_, _, _, bytes)| bytes.next_multiple_of(ALIGNMENT));
        self.bytes().len() + tensors.sum::<usize>()
    }

    /// The header's bytes, filled up to where tensors begin.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut bytes, key);
            let mut raw = Vec::new();
            let kind = put_value(&mut raw, value);
            bytes.extend(kind.to_le_bytes());
            bytes.extend(raw);
        }
        let mut offset = 0;
        for (name, shape, kind, length) in &self.tensors {
            put_text(&mut bytes, name);
            bytes.extend((shape.len() as u32).to_le_bytes());
            // columns come first in the file
            shape.iter().rev().for_each(|&size| bytes.extend((size as u64).to_le_bytes()));
            bytes.extend(kind.number().to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset += length.next_multiple_of(ALIGNMENT);
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    /// Writes the header; the tensors come after it, in order.
    ///
    /// # Errors
    /// The system's.
    pub fn write<W: Write>(self, mut out: W) -> io::Result<TensorWriter<W>> {
        out.write_all(&self.bytes())?;
        Ok(TensorWriter { out, left: self.tensors.iter().rev().map(|(_, _, _, bytes)| *bytes).collect(), filled: 0 })
    }
}

/// Writes the bytes of the tensors that a [`Header`] has announced.
#[derive(Debug)]
pub struct TensorWriter<W> {
    out: W,
    /// Bytes of those that are not whole yet, the next one last.
    left: Vec<usize>,
    /// Bytes that the next one has already.
    filled: usize,
}

impl<W: Write> TensorWriter<W> {
    /// Writes bytes of the next tensor, all or some of them.
    ///
    /// # Errors
    /// They are more than it has, or the system's.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = self.left.last().copied().unwrap_or(0);
        if bytes.len() > length - self.filled {
            return Err(io::Error::other("a tensor has more bytes than were announced"));
        }
        self.out.write_all(bytes)?;
        self.filled += bytes.len();
        if self.filled == length {
            self.out.write_all(&[0; ALIGNMENT][..length.next_multiple_of(ALIGNMENT) - length])?;
            self.left.pop();
            self.filled = 0;
        }
        Ok(())
    }

    /// Leaves the file as it is, with tensors missing.
    ///
    /// # Errors
    /// The system's.
    pub fn stop(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }

    /// Ends the file.
    ///
    /// # Errors
    /// A tensor is missing, or the system's.
    pub fn finish(mut self) -> io::Result<()> {
        if !self.left.is_empty() {
            return Err(io::Error::other("a tensor that was announced is missing"));
        }
        self.out.flush()
    }
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// Writes a value and gives the number of its type: 32 bits where they hold it, as llama.cpp expects.
fn put_value(to: &mut Vec<u8>, value: &Value) -> u32 {
    match value {
        Value::Unsigned(number) => match u32::try_from(*number) {
            Ok(number) => {
                to.extend(number.to_le_bytes());
                4
            }
            Err(_) => {
                to.extend(number.to_le_bytes());
                10
            }
        },
        Value::Signed(number) => match i32::try_from(*number) {
            Ok(number) => {
                to.extend(number.to_le_bytes());
                5
            }
            Err(_) => {
                to.extend(number.to_le_bytes());
                11
            }
        },
        Value::Float(number) => {
            to.extend((*number as f32).to_le_bytes());
            6
        }
        Value::Bool(flag) => {
            to.push(u8::from(*flag));
            7
        }
        Value::Text(text) => {
            put_text(to, text);
            8
        }
        Value::Array(values) => {
            let mut items = Vec::new();
            let kind = values.iter().map(|value| put_value(&mut items, value)).last().unwrap_or(4);
            to.extend(kind.to_le_bytes());
            to.extend((values.len() as u64).to_le_bytes());
            to.extend(items);
            9
        }
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Unsigned(number)
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Unsigned(number as u64)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Bool(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_as_many_bytes_as_were_announced() {
        let mut header = Header::default();
        header.value("a", Value::from(1usize));
        header.tensor("x", &[2, 3], BlockType::F32).expect("it fits");
        header.tensor("y", &[1, 32], BlockType::Q8_0).expect("it fits");
        assert!(
            header.tensor("z", &[2, 31], BlockType::Q8_0).is_err()
                && header.tensor("z", &[], BlockType::F32).is_err()
        );
        let length = header.num_bytes();
        let mut bytes = Vec::new();
        let mut writer = header.write(&mut bytes).expect("written");
        writer.put(&[1; 20]).expect("some");
        assert!(writer.put(&[1; 5]).is_err());
        writer.put(&[1; 4]).expect("the rest");
        writer.put(&[2; 34]).expect("all");
        assert!(writer.put(&[3]).is_err());
        writer.finish().expect("whole");
        assert_eq!(bytes.len(), length);

        let mut header = Header::default();
        header.tensor("x", &[2], BlockType::F32).expect("it fits");
        assert!(header.write(Vec::new()).expect("written").finish().is_err());
    }
}
