//! Numbers with a range, checked while they are parsed, so that an error points at the number itself.

use serde::{Deserialize, Serialize};

macro_rules! ranged {
    ($(#[$doc:meta])* $name:ident, $valid:expr, $says:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(try_from = "f64", into = "f64")]
        pub struct $name(f64);

        impl $name {
            /// The number.
            #[must_use]
            pub const fn get(self) -> f64 {
                self.0
            }

            /// For constants, which are within the range as they stand.
            #[must_use]
            pub const fn constant(value: f64) -> Self {
                Self(value)
            }
        }

        impl TryFrom<f64> for $name {
            type Error = String;
            fn try_from(value: f64) -> Result<Self, String> {
                let valid: fn(f64) -> bool = $valid;
                if valid(value) { Ok(Self(value)) } else { Err(format!(concat!("{} is not ", $says), value)) }
            }
        }

        impl From<$name> for f64 {
            fn from(value: $name) -> f64 {
                value.0
            }
        }
    };
}

ranged!(
    /// A finite number above zero.
    Positive, |x| x.is_finite() && x > 0.0, "above zero"
);
ranged!(
    /// A finite number, zero or above.
    NonNegative, |x| x.is_finite() && x >= 0.0, "zero or above"
);
ranged!(
    /// A share, from zero to below one.
    Share, |x| (0.0..1.0).contains(&x), "a share: 0 or above and below 1"
);
ranged!(
    /// A share of wrong labels, from zero to below one half.
    Smoothing, |x| (0.0..0.5).contains(&x), "from 0 to below 0.5"
);
/// A count of at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Count(usize);

impl Count {
    /// The number.
    #[must_use]
    pub const fn get(self) -> usize {
        self.0
    }

    /// For constants of at least one.
    #[must_use]
    pub const fn constant(value: usize) -> Self {
        Self(value)
    }
}

impl TryFrom<u64> for Count {
    type Error = String;
    fn try_from(value: u64) -> Result<Self, String> {
        match usize::try_from(value) {
            Ok(0) | Err(_) => Err(format!("{value} is not a whole number of at least 1")),
            Ok(value) => Ok(Self(value)),
        }
    }
}

impl From<Count> for u64 {
    fn from(value: Count) -> u64 {
        value.0 as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold() {
        assert!(Positive::try_from(0.0).is_err() && Positive::try_from(f64::INFINITY).is_err());
        assert!(NonNegative::try_from(0.0).is_ok() && NonNegative::try_from(-1e-9).is_err());
        assert!(Share::try_from(1.0).is_err() && Share::try_from(f64::NAN).is_err());
        assert!(Smoothing::try_from(0.5).is_err() && Smoothing::try_from(0.49).is_ok());
        assert_eq!(Count::try_from(0), Err("0 is not a whole number of at least 1".into()));
        assert_eq!(Count::try_from(7).map(Count::get), Ok(7));
    }
}
