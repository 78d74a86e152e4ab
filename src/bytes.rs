//! Amounts of memory: as recipes have them (`"8GiB"`), and for a person to read.

use std::fmt;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes, at least one. In a recipe `"8GiB"`, `"8GB"`, `"1.5GiB"`, `"500MiB"` and the like, or the bytes
/// themselves as a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(usize);

const UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
];

impl Bytes {
    /// The number.
    #[must_use]
    pub fn get(self) -> usize {
        self.0
    }

    /// At least that many bytes, in whole MiB.
    #[must_use]
    pub fn whole_mebibytes(bytes: usize) -> Self {
        Self(bytes.div_ceil(1 << 20).max(1) << 20)
    }

    fn unit(self) -> Option<(&'static str, u64)> {
        UNITS[..3].iter().copied().find(|(_, unit)| (self.0 as u64).is_multiple_of(*unit))
    }

    fn parse(text: &str) -> Option<Self> {
        let (number, unit) = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))?;
        let number: f64 = number.trim_end().parse().ok()?;
        let bytes = number * unit as f64;
        // beyond this an f64 does not count bytes, and no machine has them
        (number.is_finite() && (1.0..9e15).contains(&bytes)).then(|| usize::try_from(bytes as u64).ok().map(Self))?
    }
}

impl std::str::FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| "an amount is \"5GB\", \"500MiB\" and the like".to_owned())
    }
}

/// For a person: `1.94 GiB`, `412 MiB`.
#[must_use]
pub fn shown(bytes: usize) -> String {
    let (mib, gib) = ((1 << 20) as f64, (1 << 30) as f64);
    match bytes as f64 {
        b if b >= 100.0 * gib => format!("{:.0} GiB", b / gib),
        b if b >= gib => format!("{:.2} GiB", b / gib),
        b if b >= 10.0 * mib => format!("{:.0} MiB", b / mib),
        b if b >= 0.05 * mib => format!("{:.1} MiB", b / mib),
        _ => format!("{bytes} bytes"),
    }
}

/// As a recipe has it: exactly, in the largest unit that divides it.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit() {
            Some((name, unit)) => write!(f, "{}{name}", self.0 as u64 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.unit() {
            Some(_) => serializer.collect_str(self),
            None => serializer.serialize_u64(self.0 as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount of memory, e.g. \"8GiB\" or \"500MiB\", or a whole number of bytes")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Bytes, E> {
                Bytes::parse(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes > 0);
                bytes.map(Bytes).ok_or_else(|| E::custom("no memory at all is nothing to work with"))
            }
            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                self.visit_u64(u64::try_from(bytes).unwrap_or(0))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Result<Bytes, toml::de::Error> {
        #[derive(Deserialize)]
        struct Table {
            memory: Bytes,
        }
        toml::from_str::<Table>(&format!("memory = {value}")).map(|table| table.memory)
    }

    #[test]
    fn recipes_say_it_in_several_ways() {
        for (text, bytes) in [
            ("\"8GiB\"", 8 << 30),
            ("\"8 GB\"", 8_000_000_000),
            ("\"1.5GiB\"", 3 << 29),
            ("\"500MiB\"", 500 << 20),
            ("123456789", 123_456_789),
        ] {
            assert_eq!(read(text).map(Bytes::get), Ok(bytes), "{text}");
        }
        for text in
            ["\"8\"", "\"8G\"", "\"GiB\"", "\"-1GiB\"", "\"0MiB\"", "\"nanGiB\"", "\"1e30GiB\"", "0", "-5", "1.5"]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for bytes in [Bytes(8 << 30), Bytes(1954 << 20), Bytes(123_456_789)] {
            let text = toml::Value::try_from(bytes).expect("written").to_string();
            assert_eq!(read(&text), Ok(bytes), "{text}");
        }
        assert_eq!(Bytes::whole_mebibytes((5 << 20) + 1), Bytes(6 << 20));
        assert_eq!(shown(2_083_059_138), "1.94 GiB");
        assert_eq!(shown(432_013_312), "412 MiB");
    }
}
