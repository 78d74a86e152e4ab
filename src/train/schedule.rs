//! Learning-rate schedules, as `transformers` computes them.

use std::f64::consts::PI;
use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// It falls in a straight line to zero.
    #[default]
    Linear,
    /// It falls to zero along half a cosine.
    Cosine,
}

impl Schedule {
    /// What the learning rate is multiplied by in update number `update` (from 0) of `total`.
    ///
    /// It rises from zero over the first `warmup` updates, so that the first of them changes nothing, as in
    /// `transformers`.
    #[must_use]
    pub fn factor(self, update: usize, warmup: usize, total: usize) -> f64 {
        if update < warmup {
            return update as f64 / warmup as f64;
        }
        let progress = (update - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
        }
    }
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// A share of all updates: a number below one.
    Share(f64),
    /// A number of updates.
    Updates(usize),
}

impl Warmup {
    /// In updates, a share rounded up.
    #[must_use]
    pub fn updates(self, total: usize) -> usize {
        match self {
            Self::Share(share) => (share * total as f64).ceil() as usize,
            Self::Updates(updates) => updates,
        }
    }
}

impl Serialize for Warmup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Share(share) => serializer.serialize_f64(share),
            Self::Updates(updates) => serializer.serialize_u64(updates as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Warmup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl Visitor<'_> for Read {
            type Value = Warmup;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a share of the updates (0.1) or a number of them (100)")
            }
            fn visit_i64<E: de::Error>(self, updates: i64) -> Result<Warmup, E> {
                let problem =
                    || E::custom(format!("{updates} is not a share from 0 to below 1 or a count of updates"));
                usize::try_from(updates).map(Warmup::Updates).map_err(|_| problem())
            }
            fn visit_u64<E: de::Error>(self, updates: u64) -> Result<Warmup, E> {
                Ok(Warmup::Updates(usize::try_from(updates).unwrap_or(usize::MAX)))
            }
            fn visit_f64<E: de::Error>(self, share: f64) -> Result<Warmup, E> {
                if !(0.0..1.0).contains(&share) {
                    return Err(E::custom(format!("{share} is not a share from 0 to below 1")));
                }
                Ok(Warmup::Share(share))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `transformers.get_{linear,cosine,constant}_schedule_with_warmup`, 5.23.0, 2 warm-up updates of 8.
    #[test]
    fn factors_are_those_of_transformers() {
        let linear = [0.0, 0.5, 1.0, 0.833_333_333, 0.666_666_667, 0.5, 0.333_333_333, 0.166_666_667];
        let cosine = [0.0, 0.5, 1.0, 0.933_012_702, 0.75, 0.5, 0.25, 0.066_987_298];
        for update in 0..8 {
            assert!((Schedule::Linear.factor(update, 2, 8) - linear[update]).abs() < 1e-9);
            assert!((Schedule::Cosine.factor(update, 2, 8) - cosine[update]).abs() < 1e-9);
            assert_eq!(Schedule::Constant.factor(update, 2, 8), (update as f64 / 2.0).min(1.0));
        }
    }

    #[test]
    fn a_share_rounds_up_and_no_warmup_begins_in_full() {
        assert_eq!(Warmup::Share(0.1).updates(32), 4);
        assert_eq!(Warmup::Updates(7).updates(32), 7);
        assert_eq!(Schedule::Linear.factor(0, 0, 1), 1.0);
    }
}
