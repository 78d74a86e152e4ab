//! Where rows come from: Parquet, JSON lines and JSON arrays, one row in memory at a time.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde::de::{self, DeserializeSeed, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::DataError;
use crate::hostile::unpanicked;
use crate::hub::{self, Address, Hub};
use crate::progress::{Bar, Console};
use crate::suggest::did_you_mean;
use crate::tensor_file::{describe_io, is_lfs_pointer};

/// A file, a glob or an address on the hub, and how often an epoch sees each of its rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file, a pattern with `*`, `?` or `[...]`, or `hf://datasets/ORG/NAME/SPLIT`.
    pub path: PathBuf,
    /// Times an epoch sees each row: 2 is every row twice, 0.5 a random half of them, another half every epoch.
    #[serde(default)]
    pub weight: Weight,
}

/// Times an epoch sees each row, above 0 and at most 1000.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Weight(f64);

impl Default for Weight {
    fn default() -> Self {
        Self(1.0)
    }
}

impl TryFrom<f64> for Weight {
    type Error = String;
    fn try_from(value: f64) -> Result<Self, String> {
        // an epoch's order is held in memory
        if value > 0.0 && value <= 1000.0 {
            Ok(Self(value))
        } else {
            Err(format!("{value} is not above 0, up to 1000"))
        }
    }
}

impl From<Weight> for f64 {
    fn from(weight: Weight) -> f64 {
        weight.0
    }
}

/// One source or several: `"a.jsonl"`, `"shards/*.parquet"`, `["a.jsonl", { path = "b.jsonl", weight = 2.0 }]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sources(Vec<Source>);

impl Sources {
    /// A single source of weight 1.
    #[must_use]
    pub fn one(path: impl Into<PathBuf>) -> Self {
        Self(vec![Source { path: path.into(), weight: Weight::default() }])
    }

    /// What each source is called.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|source| source.path.display().to_string()).collect()
    }

    /// The local files and globs, to anchor those that are relative.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.0.iter_mut().map(|source| &mut source.path).filter(|path| !hub::is_address(path))
    }
}

impl Serialize for Sources {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let [only] = self.0.as_slice()
            && only.weight == Weight::default()
        {
            return only.path.serialize(serializer);
        }
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for source in &self.0 {
            list.serialize_element(source)?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// A path, or a table with path and weight.
        struct One(Source);
        impl<'de> Deserialize<'de> for One {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Form;
                impl<'de> Visitor<'de> for Form {
                    type Value = Source;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a path, or { path = \"...\", weight = 1.0 }")
                    }
                    fn visit_str<E: de::Error>(self, path: &str) -> Result<Source, E> {
                        Ok(Source { path: path.into(), weight: Weight::default() })
                    }
                    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Source, A::Error> {
                        Source::deserialize(de::value::MapAccessDeserializer::new(map))
                    }
                }
                let source = deserializer.deserialize_any(Form)?;
                if source.path.as_os_str().is_empty() {
                    Err(de::Error::custom("the path is empty"))
                } else {
                    Ok(Self(source))
                }
            }
        }
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Sources;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a file, a glob, or a list of them: [\"a.jsonl\", { path = \"b.jsonl\", weight = 2.0 }]")
            }
            fn visit_str<E: de::Error>(self, path: &str) -> Result<Sources, E> {
                if path.is_empty() { Err(E::custom("the path is empty")) } else { Ok(Sources::one(path)) }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Sources, A::Error> {
                let mut sources = Vec::new();
                while let Some(One(source)) = items.next_element()? {
                    sources.push(source);
                }
                if sources.is_empty() { Err(de::Error::custom("names no file")) } else { Ok(Sources(sources)) }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// Where in its file a row stands, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A line of text.
    Line(u64),
    /// A row of a table or an element of an array.
    Row(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(number) => write!(f, "line {number}"),
            Self::Row(number) => write!(f, "row {number}"),
        }
    }
}

/// A row: the columns that are read, under their own names.
pub(super) struct Row {
    pub(super) place: Place,
    pub(super) values: Map<String, Value>,
}

/// The name under which a column of a file is read; `None` if it is not read.
pub(super) type Naming<'n> = &'n dyn Fn(&str) -> Option<&'static str>;

/// What takes the rows of a file.
pub(super) trait Rows {
    /// All columns of the file, before its first row.
    fn columns(&mut self, columns: Vec<String>) -> Result<(), DataError>;
    /// The next row.
    fn row(&mut self, row: Row) -> Result<(), DataError>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Parquet,
    Lines,
    Array,
}

/// A file to read.
#[derive(Debug)]
pub(super) struct DataFile {
    /// Where it is.
    path: PathBuf,
    /// What messages call it: its path, or its address on the hub.
    pub(super) name: PathBuf,
    pub(super) weight: f64,
    pub(super) bytes: u64,
    format: Format,
}

/// The files that `sources` name, in order, those of a glob or of a split by name. Those of the hub are fetched.
pub(super) fn resolve(sources: &Sources, console: &Console) -> Result<Vec<DataFile>, DataError> {
    let mut files = Vec::new();
    for source in &sources.0 {
        if hub::is_address(&source.path) {
            let address = Address::parse(&source.path.to_string_lossy())?;
            for (path, name) in address.fetch(&Hub::from_env()?, console)? {
                files.push(DataFile::open(path, name, source.weight.into())?);
            }
            continue;
        }
        // a file may have brackets in its name
        let is_pattern = source.path.to_string_lossy().contains(['*', '?', '[']) && !source.path.exists();
        let paths = if is_pattern { matches(&source.path)? } else { vec![source.path.clone()] };
        for path in paths {
            files.push(DataFile::open(path.clone(), path, source.weight.into())?);
        }
    }
    Ok(files)
}

fn matches(pattern: &Path) -> Result<Vec<PathBuf>, DataError> {
    // the folders that exist are names, not patterns, whatever characters they have
    let mut folder = PathBuf::new();
    let mut rest = pattern.components().peekable();
    while let Some(component) = rest.next_if(|component| folder.join(component).is_dir()) {
        folder.push(component);
    }
    let rest: PathBuf = rest.collect();
    let full = Path::new(&glob::Pattern::escape(&folder.to_string_lossy())).join(&rest);
    let found = glob::glob(&full.to_string_lossy())
        .map_err(|e| DataError::file(pattern, format!("is no valid pattern: {e}")))?;
    let files: Vec<PathBuf> = found.filter_map(Result::ok).filter(|path| path.is_file()).collect();
    if files.is_empty() {
        return Err(DataError::file(pattern, "matches no file").help(what_is_there(&folder, &rest)));
    }
    Ok(files)
}

/// The files of a folder that could be meant by `name`.
fn what_is_there(folder: &Path, name: &Path) -> String {
    let shown_folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = std::fs::read_dir(shown_folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    if let Some(meant) = did_you_mean(&name.to_string_lossy(), names.iter().map(String::as_str)) {
        return format!("did you mean `{}`?", folder.join(meant).display());
    }
    match names.as_slice() {
        [] => format!("there is nothing in {}", shown_folder.display()),
        names => format!("in {} there are {}", shown_folder.display(), super::list(names)),
    }
}

impl DataFile {
    fn open(path: PathBuf, name: PathBuf, weight: f64) -> Result<Self, DataError> {
        let error = |problem: &str, help: &str| DataError::file(&name, problem).help(help);
        if path.is_dir() {
            return Err(error("is a folder, not a file", "a glob reads the files of a folder: FOLDER/*.parquet"));
        }
        let bytes = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(e) => {
                let (folder, file) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
                let help = if folder.as_os_str().is_empty() || folder.is_dir() {
                    what_is_there(folder, Path::new(file))
                } else {
                    "data is a local file or glob, or hf://datasets/ORG/NAME/SPLIT on the hub".to_owned()
                };
                return Err(error(&describe_io(&e), &help));
            }
        };
        if is_lfs_pointer(&path) {
            let help = "run `git lfs pull` in that folder, or fetch the file from the hub";
            return Err(error("is a Git-LFS pointer, not the file itself", help));
        }
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let format = match extension.as_str() {
            "parquet" => Format::Parquet,
            "jsonl" | "ndjson" => Format::Lines,
            "json" => match first_byte(&path) {
                Ok(Some(b'[')) => Format::Array,
                Ok(_) => Format::Lines,
                Err(e) => return Err(error(&describe_io(&e), "check the file's permissions")),
            },
            "gz" | "zst" | "bz2" | "xz" | "zip" => {
                return Err(error("is compressed", "unpack it; Parquet is compressed inside and is read as it is"));
            }
            _ => return Err(error("has no known extension", "what is read is .parquet, .jsonl, .ndjson and .json")),
        };
        Ok(Self { path, name, weight, bytes, format })
    }

    /// Hands all rows to `rows`.
    pub(super) fn read(&self, columns: Naming<'_>, bar: &Bar<'_>, rows: &mut dyn Rows) -> Result<(), DataError> {
        match self.format {
            Format::Parquet => self.read_parquet(columns, bar, rows),
            Format::Lines => self.read_lines(columns, bar, rows),
            Format::Array => self.read_array(columns, bar, rows),
        }
    }

    fn open_file(&self) -> Result<File, DataError> {
        File::open(&self.path).map_err(|e| DataError::file(&self.name, describe_io(&e)))
    }

    fn read_lines(&self, columns: Naming<'_>, bar: &Bar<'_>, rows: &mut dyn Rows) -> Result<(), DataError> {
        let mut file = BufReader::with_capacity(1 << 20, self.open_file()?);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let place = Place::Line(number);
            let read = (&mut file).take(MAX_LINE + 1).read_until(b'\n', &mut line);
            let read = read.map_err(|e| DataError::row(&self.name, place, describe_io(&e)))? as u64;
            if read == 0 {
                break;
            }
            if read > MAX_LINE {
                let problem = format!("is longer than {} MiB", MAX_LINE >> 20);
                return Err(DataError::row(&self.name, place, problem).help("JSON lines hold one row a line"));
            }
            bar.advance(read);
            let text = if number == 1 { line.strip_prefix(BOM).unwrap_or(&line) } else { &line };
            let text = text.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let value: Value = serde_json::from_slice(text).map_err(|e| self.bad_line(place, text, &e))?;
            self.hand_over(value, place, columns, number == 1, rows)?;
        }
        Ok(())
    }

    fn bad_line(&self, place: Place, text: &[u8], error: &serde_json::Error) -> DataError {
        if let Err(e) = std::str::from_utf8(text) {
            let problem = format!("is not UTF-8 text (at byte {})", e.valid_up_to());
            return DataError::row(&self.name, place, problem).help("save the file as UTF-8");
        }
        let help = if error.is_eof() {
            "JSON lines hold one whole row a line; the file may be cut short, or its rows may span lines: \
             a JSON array of rows is read too, if the file begins with `[`"
        } else {
            "JSON lines hold one row a line, as an object"
        };
        // the line of the error is always 1 here, and would be taken for the file's
        let problem = error.to_string().replace(" at line 1 column ", " at column ");
        DataError::row(&self.name, place, format!("is no JSON: {problem}")).help(help)
    }

    fn read_array(&self, columns: Naming<'_>, bar: &Bar<'_>, rows: &mut dyn Rows) -> Result<(), DataError> {
        let mut file = BufReader::with_capacity(1 << 20, Counting { file: self.open_file()?, bar });
        if file.fill_buf().is_ok_and(|start| start.starts_with(BOM)) {
            file.consume(BOM.len());
        }
        let mut stopped = None;
        let mut json = serde_json::Deserializer::from_reader(file);
        let mut number = 0;
        let parsed = Elements {
            each: |value| {
                number += 1;
                let handed = self.hand_over(value, Place::Row(number), columns, number == 1, rows);
                handed.map_err(|e| stopped = Some(e)).is_ok()
            },
        }
        .deserialize(&mut json);
        let parsed = parsed.and_then(|()| json.end());
        if let Some(error) = stopped {
            return Err(error);
        }
        parsed.map_err(|e| {
            let problem = format!("is no JSON array of rows: {e}");
            let error = DataError::row(&self.name, Place::Row(number + 1), problem);
            if e.is_eof() { error.help("the file is cut short; fetch it again") } else { error }
        })
    }

    fn read_parquet(&self, columns: Naming<'_>, bar: &Bar<'_>, rows: &mut dyn Rows) -> Result<(), DataError> {
        let broken = |place: Option<Place>, e: &dyn fmt::Display| DataError::File {
            file: self.name.clone(),
            place,
            problem: format!("is no whole Parquet file: {e}"),
            help: Some("the download or copy may not have finished; fetch the file again".into()),
        };
        let file = self.open_file()?;
        let file = unpanicked(|| SerializedFileReader::new(file)).map_err(|e| broken(None, &e))?;
        let metadata = file.metadata().file_metadata();
        let fields = metadata.schema().get_fields();
        rows.columns(fields.iter().map(|field| field.name().to_owned()).collect())?;
        // columns that are not read (images, embeddings) are not decoded either
        let read = fields.iter().filter(|field| columns(field.name()).is_some()).cloned().collect();
        let schema = Type::group_type_builder(metadata.schema().name()).with_fields(read).build();
        let schema = schema.map_err(|e| broken(None, &e))?;
        let total = u64::try_from(metadata.num_rows()).unwrap_or(0).max(1);
        let mut table = unpanicked(|| file.get_row_iter(Some(schema))).map_err(|e| broken(None, &e))?;
        for number in 1.. {
            let place = Place::Row(number);
            let row = unpanicked(|| table.next().transpose()).map_err(|e| broken(Some(place), &e))?;
            let Some(row) = row else { break };
            let values = row
                .into_columns()
                .into_iter()
                .filter_map(|(name, field)| Some((columns(&name)?.to_owned(), value(&field))))
                .collect();
            rows.row(Row { place, values })?;
            let share = |row: u64| u128::from(self.bytes) * u128::from(row.min(total)) / u128::from(total);
            bar.advance((share(number) - share(number - 1)) as u64);
        }
        Ok(())
    }

    /// Hands a row of a JSON file over.
    fn hand_over(
        &self,
        value: Value,
        place: Place,
        columns: Naming<'_>,
        first: bool,
        rows: &mut dyn Rows,
    ) -> Result<(), DataError> {
        let Value::Object(object) = value else {
            let problem = format!("is {}, not a row", kind(&value));
            return Err(DataError::row(&self.name, place, problem).help("a row is an object: {\"prompt\": ..., ...}"));
        };
        if first {
            rows.columns(object.keys().cloned().collect())?;
        }
        let values =
            object.into_iter().filter_map(|(name, value)| Some((columns(&name)?.to_owned(), value))).collect();
        rows.row(Row { place, values })
    }
}

/// What a line may be long; more is no line of text.
const MAX_LINE: u64 = 256 << 20;
/// Some editors begin a text file with it.
const BOM: &[u8] = b"\xef\xbb\xbf";

fn first_byte(path: &Path) -> std::io::Result<Option<u8>> {
    let mut start = Vec::new();
    File::open(path)?.take(4096).read_to_end(&mut start)?;
    Ok(start.strip_prefix(BOM).unwrap_or(&start).trim_ascii_start().first().copied())
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A Parquet value; what no row shape reads becomes null.
fn value(field: &Field) -> Value {
    match field {
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => f64::from(*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // written without the mark that it is text
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Into::into),
        Field::Group(row) => {
            Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
        }
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        _ => Value::Null,
    }
}

/// A file that moves a bar.
struct Counting<'b, 'c> {
    file: File,
    bar: &'b Bar<'c>,
}

impl Read for Counting<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.bar.advance(read as u64);
        Ok(read)
    }
}

/// The elements of a JSON array, one at a time, until `each` says to stop.
struct Elements<F> {
    each: F,
}

impl<'de, F: FnMut(Value) -> bool> DeserializeSeed<'de> for Elements<F> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Value) -> bool> Visitor<'de> for Elements<F> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }
    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        while let Some(value) = items.next_element()? {
            if !(self.each)(value) {
                return Err(de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}
