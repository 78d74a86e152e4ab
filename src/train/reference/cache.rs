//! Log-probabilities of the reference on disk, so that another run on the same base and rows need not compute them.
//!
//! ```text
//! <cache>/<key>/part-<time>-<process>.parquet     example · chosen_logp · rejected_logp · chosen_tokens · rejected_tokens
//! ```
//!
//! The key is a hash of all that the numbers depend on: the base's weights and shape, and the token ids. It does not
//! hold the loss, beta, the adapter or the learning rate. A pass writes a part now and then and merges all into one at
//! its end; a part is there whole or not at all, so what a killed pass had written is there for the next.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use miette::Diagnostic;
use parquet::basic::Compression;
use parquet::data_type::{DoubleType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::Field;
use parquet::schema::parser::parse_message_type;
use thiserror::Error;

use super::Side;
use crate::data::{Dataset, Example};
use crate::files::{self, WriteError, cannot_write};
use crate::hostile::unpanicked;
use crate::model::DecoderConfig;
use crate::tensor_file::describe_io;

/// Changes when the same base and tokens would give other numbers, or the file's columns change.
const VERSION: &str = "1";

const SCHEMA: &str = "message reference_logps {
    required int32 example;
    optional double chosen_logp;
    optional double rejected_logp;
    required int32 chosen_tokens;
    required int32 rejected_tokens;
}";

/// What is known of one example: chosen and rejected, summed over the completion's tokens; `None` where there is no such
/// side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// Its number in the data.
    pub example: usize,
    /// Of chosen and of rejected.
    pub logps: [Option<f64>; 2],
}

/// The folder of one base on one data set.
#[derive(Debug, Clone)]
pub struct ReferenceCache {
    folder: PathBuf,
}

/// A part that is not what it should be.
#[derive(Debug, Error, Diagnostic)]
#[error("{}: {problem}", file.display())]
pub struct BrokenPart {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

impl ReferenceCache {
    /// The cache under `root` of the base whose weight files hash to `base`, on the rows of `data`. Nothing is read or
    /// made yet.
    ///
    /// Whether prompts are shared changes the rounding, and with it whether a fresh policy is the reference to the bit; so
    /// it is part of the key.
    #[must_use]
    pub fn new(root: &Path, base: &str, config: &DecoderConfig, data: &Dataset, share_prompts: bool) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("dpo-lora reference log-probs");
        // every field of the config, the frequencies of rope among them, is in its debug form
        let shared = if share_prompts { "shared" } else { "apart" };
        for part in [VERSION, base, &format!("{config:?}"), data.token_hash().to_hex().as_str(), shared] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self { folder: root.join(&hasher.finalize().to_hex()[..32]) }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Everything in it, with the files it came from. An example may be there twice.
    ///
    /// # Errors
    /// A part that is broken or belongs to other rows. A folder that is not there is an empty one.
    pub fn read(&self, data: &Dataset) -> Result<(Vec<Entry>, Vec<PathBuf>), BrokenPart> {
        let mut parts: Vec<PathBuf> =
            fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        parts.retain(|path| path.extension().is_some_and(|extension| extension == "parquet"));
        parts.sort_unstable();
        let (mut entries, mut read) = (Vec::new(), Vec::new());
        for file in parts {
            let broken = |problem: String| BrokenPart { file: file.clone(), problem };
            match File::open(&file) {
                Ok(open) => entries.extend(read_part(open, data).map_err(broken)?),
                // merged meanwhile by another run, which has it in a file of its own
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(broken(describe_io(&error))),
            }
            read.push(file);
        }
        Ok((entries, read))
    }

    /// Writes a part.
    ///
    /// # Errors
    /// The system's.
    pub fn append(&self, entries: &[Entry], data: &Dataset) -> Result<(), WriteError> {
        fs::create_dir_all(&self.folder).map_err(cannot_write(&self.folder))?;
        // another run, on another machine too, may write at the same time
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let path = self.folder.join(format!("part-{now:020}-{}.parquet", std::process::id()));
        let bytes = encode(entries, data).map_err(|e| cannot_write(&path)(io::Error::other(e)))?;
        files::write(&path, &bytes)
    }

    /// Makes one part of all. Files that another run writes meanwhile stay.
    ///
    /// # Errors
    /// The system's. A part that cannot be read is left to the next run to find.
    pub fn merge(&self, data: &Dataset) -> Result<(), WriteError> {
        let Ok((mut entries, parts)) = self.read(data) else { return Ok(()) };
        if parts.len() < 2 {
            return Ok(());
        }
        entries.sort_by_key(|entry| entry.example);
        entries.dedup_by_key(|entry| entry.example);
        self.append(&entries, data)?;
        for part in parts {
            // one that stays only takes room
            let _ = fs::remove_file(part);
        }
        Ok(())
    }

    /// Removes everything in it.
    ///
    /// # Errors
    /// The system's.
    pub fn discard(&self) -> Result<(), WriteError> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot_write(&self.folder)(error)),
            _ => Ok(()),
        }
    }
}

fn encode(entries: &[Entry], data: &Dataset) -> Result<Vec<u8>, ParquetError> {
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let ints = |of: &dyn Fn(&Entry) -> usize| entries.iter().map(|entry| of(entry) as i32).collect::<Vec<_>>();
    let tokens = |side: Side| ints(&|entry| side.tokens(&data.get(entry.example)).map_or(0, <[u32]>::len));
    let example = ints(&|entry| entry.example);
    let lengths = [tokens(Side::Chosen), tokens(Side::Rejected)];
    for column in 0.. {
        let Some(mut writer) = group.next_column()? else { break };
        match column {
            0 => writer.typed::<Int32Type>().write_batch(&example, None, None)?,
            1 | 2 => {
                let logps = || entries.iter().map(|entry| entry.logps[column - 1]);
                let present: Vec<i16> = logps().map(|logp| i16::from(logp.is_some())).collect();
                let values: Vec<f64> = logps().flatten().collect();
                writer.typed::<DoubleType>().write_batch(&values, Some(&present), None)?
            }
            _ => writer.typed::<Int32Type>().write_batch(&lengths[column - 3], None, None)?,
        };
        writer.close()?;
    }
    group.close()?;
    writer.close()?;
    Ok(bytes)
}

/// The entries of a part. Whatever it holds, each of them is of an example of `data`, with the sides that this has.
fn read_part(file: File, data: &Dataset) -> Result<Vec<Entry>, String> {
    let schema = parse_message_type(SCHEMA).map_err(|e| e.to_string())?;
    unpanicked(|| {
        let reader = SerializedFileReader::new(file).map_err(|e| format!("is no whole Parquet file: {e}"))?;
        if reader.metadata().file_metadata().schema().get_fields() != schema.get_fields() {
            return Err("has other columns than a reference cache".to_owned());
        }
        let rows = reader.metadata().file_metadata().num_rows();
        if !usize::try_from(rows).is_ok_and(|rows| rows <= data.len()) {
            return Err(format!("has {rows} rows, and the data {}", data.len()));
        }
        let mut entries = Vec::new();
        for row in reader.get_row_iter(None).map_err(|e| e.to_string())? {
            let row = row.map_err(|e| format!("is no whole Parquet file: {e}"))?;
            let fields: Vec<&Field> = row.get_column_iter().map(|(_, field)| field).collect();
            let number = entries.len() + 1;
            let entry = entry(&fields, data).filter(|_| number <= data.len());
            entries.push(entry.ok_or_else(|| format!("row {number} does not belong to this data"))?);
        }
        Ok(entries)
    })
}

fn entry(fields: &[&Field], data: &Dataset) -> Option<Entry> {
    let &[Field::Int(example), chosen, rejected, Field::Int(chosen_tokens), Field::Int(rejected_tokens)] = fields
    else {
        return None;
    };
    let example = usize::try_from(*example).ok().filter(|&example| example < data.len())?;
    let of_data: Example<'_> = data.get(example);
    let side = |side: Side, logp: &Field, tokens: i32| match (side.tokens(&of_data), logp) {
        (Some(ids), &Field::Double(logp)) => {
            // no sum of log-probabilities is above zero, but for rounding
            (usize::try_from(tokens) == Ok(ids.len()) && logp.is_finite() && logp <= 1e-3).then_some(Some(logp))
        }
        (None, Field::Null) => Some(None),
        _ => None,
    };
    let logps = [side(Side::Chosen, chosen, *chosen_tokens)?, side(Side::Rejected, rejected, *rejected_tokens)?];
    Some(Entry { example, logps })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Dataset {
        Dataset::of(&[(&[1, 2], &[3, 4], &[5]), (&[1], &[2], &[]), (&[7], &[], &[8, 9])])
    }

    const ENTRIES: [Entry; 3] = [
        Entry { example: 0, logps: [Some(-3.25), Some(-0.1)] },
        Entry { example: 1, logps: [Some(-1e-300), None] },
        Entry { example: 2, logps: [None, Some(-123.456_789_012_345)] },
    ];

    fn cache(root: &Path) -> ReferenceCache {
        let config: DecoderConfig =
            crate::model::family::read_config(Path::new("tests/fixtures/golden/gqa")).expect("one");
        ReferenceCache::new(root, "base", &config, &data(), true)
    }

    #[test]
    fn parts_come_back_to_the_bit_and_are_merged_into_one() {
        let place = tempfile::tempdir().expect("a folder");
        let (cache, data) = (cache(place.path()), data());
        assert_eq!(cache.read(&data).expect("nothing is there").0, []);
        cache.append(&ENTRIES[1..], &data).expect("written");
        cache.append(&ENTRIES[..2], &data).expect("written");
        assert_eq!(cache.read(&data).expect("read").1.len(), 2);
        cache.merge(&data).expect("merged");
        let (entries, parts) = cache.read(&data).expect("read");
        assert_eq!((&entries[..], parts.len()), (&ENTRIES[..], 1));
        cache.discard().expect("removed");
        assert_eq!(cache.read(&data).expect("nothing is there").0, []);
    }

    #[test]
    fn the_key_is_what_the_numbers_depend_on() {
        let place = Path::new("cache");
        let config = crate::model::family::read_config(Path::new("tests/fixtures/golden/gqa")).expect("one");
        let folder = |base: &str, config: &DecoderConfig, data: &Dataset| {
            ReferenceCache::new(place, base, config, data, true).folder().to_owned()
        };
        let expected = folder("base", &config, &data());
        assert_eq!(folder("base", &config, &data()), expected);
        assert_ne!(folder("other", &config, &data()), expected);
        assert_ne!(folder("base", &DecoderConfig { rms_norm_eps: 1e-6, ..config.clone() }, &data()), expected);
        // the same ids, cut elsewhere
        let cut = Dataset::of(&[(&[1], &[2, 3, 4], &[5]), (&[1], &[2], &[]), (&[7], &[], &[8, 9])]);
        assert_ne!(folder("base", &config, &cut), expected);
    }

    #[test]
    fn what_a_stranger_wrote_is_refused() {
        let place = tempfile::tempdir().expect("a folder");
        let (cache, data) = (cache(place.path()), data());
        let refused = |bytes: &[u8]| {
            let _ = cache.discard();
            fs::create_dir_all(cache.folder()).expect("made");
            fs::write(cache.folder().join("part-1-000000.parquet"), bytes).expect("written");
            cache.read(&data).expect_err("it is broken").problem
        };
        let good = encode(&ENTRIES, &data).expect("encoded");
        for length in 0..good.len() {
            refused(&good[..length]);
        }
        assert!(refused(b"PAR1").contains("Parquet"));
        let many = encode(&[ENTRIES[0]; 4], &data).expect("encoded");
        assert!(refused(&many).contains("has 4 rows"));
        let row: (&[u32], &[u32], &[u32]) = (&[1, 2], &[3, 4], &[5]);
        let other = Dataset::of(&[row; 5]);
        let entries = |entry: Entry| encode(&[entry], &other).expect("encoded");
        for wrong in [
            Entry { example: 4, ..ENTRIES[0] },
            Entry { logps: [Some(-1.0), None], ..ENTRIES[0] },
            Entry { logps: [Some(f64::NAN), Some(-1.0)], ..ENTRIES[0] },
            Entry { logps: [Some(2.0), Some(-1.0)], ..ENTRIES[0] },
            // of two tokens there, of one here
            Entry { example: 1, logps: [Some(-1.0), None] },
        ] {
            assert!(refused(&entries(wrong)).contains("row 1 does not belong"), "{wrong:?}");
        }
    }
}
