//! Where a model computes: what was asked for, what became of it and why.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
use miette::Diagnostic;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use crate::machine;

/// `[run] device`, and `--device`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if this binary can use one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of that number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
                number
                    .map(Self::Cuda)
                    .ok_or_else(|| "a device is \"auto\", \"cpu\", or \"cuda:0\" and so on".to_owned())
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A device, and why it is that one.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// Where the model's weights are.
    pub device: Device,
    /// In words: `cuda:0, NVIDIA H100 80GB HBM3, 78.9 GiB free`, or why it is the CPU.
    pub reason: String,
    /// Bytes that are free on it, where it is a GPU.
    pub free: Option<usize>,
}

impl Chosen {
    fn cpu(why: &str) -> Self {
        Self { device: Device::Cpu, reason: format!("cpu: {why}"), free: None }
    }

    /// The element type that a model computes in there.
    #[must_use]
    pub fn dtype(&self) -> DType {
        if self.device.is_cuda() { DType::BF16 } else { DType::F32 }
    }
}

/// Why a GPU cannot be used.
#[derive(Debug, Error, Diagnostic)]
pub enum DeviceError {
    /// There is no CUDA in this binary.
    #[error("{0} is asked for, and this binary was built without CUDA")]
    #[diagnostic(help(
        "use a binary that was built with it (`scripts/cuda_build` makes one, or `cargo build --release --features cuda` \
         where the CUDA toolkit is), or compute on the CPU: --device cpu"
    ))]
    NotBuilt(DeviceChoice),
    /// The driver does not start.
    #[error("{choice} is asked for, and there is no CUDA driver that starts: {problem}")]
    #[diagnostic(help(
        "is there an NVIDIA GPU in this machine, or given to this container, and does `nvidia-smi` list it? Without one: \
         --device cpu"
    ))]
    NoDriver {
        /// What was asked for.
        choice: DeviceChoice,
        /// What the driver says.
        problem: String,
    },
    /// The driver is older than what this binary was built with.
    #[error("{choice} is asked for, and the CUDA driver is too old: it knows CUDA {}.{}, and this binary needs 13.0", version / 1000, version % 1000 / 10)]
    #[diagnostic(help("update the NVIDIA driver to version 580 or later, or compute on the CPU: --device cpu"))]
    DriverTooOld {
        /// What was asked for.
        choice: DeviceChoice,
        /// As the driver counts: 12040 is 12.4.
        version: i32,
    },
    /// There is no such GPU.
    #[error("{choice} is asked for, and there {}", match there { 0 => "is no GPU".to_owned(), 1 => "is only cuda:0".to_owned(), n => format!("are cuda:0 to cuda:{}", n - 1) })]
    #[diagnostic(help("CUDA_VISIBLE_DEVICES hides those that it does not name; without a GPU: --device cpu"))]
    NoDevice {
        /// What was asked for.
        choice: DeviceChoice,
        /// How many there are.
        there: usize,
    },
    /// The GPU is of another architecture than the kernels.
    #[error("{choice} is {name} of compute capability {}.{}, for which this binary has no kernels", capability.0, capability.1)]
    #[diagnostic(help(
        "capability 8.0 and above can be used (A100, RTX 30 and later), and none below that which a binary was built for: \
         `scripts/cuda_build build 80` makes one for all of them; or compute on the CPU: --device cpu"
    ))]
    Architecture {
        /// What was asked for.
        choice: DeviceChoice,
        /// As the driver calls it.
        name: String,
        /// Major and minor.
        capability: (i32, i32),
    },
    /// Something else.
    #[error("{choice} cannot be used: {problem}")]
    #[diagnostic(help("another program may hold its memory, see `nvidia-smi`; or compute on the CPU: --device cpu"))]
    Other {
        /// What was asked for.
        choice: DeviceChoice,
        /// What the driver says.
        problem: String,
    },
}

/// Opens the device that was asked for; of [`DeviceChoice::Auto`], the first GPU if it can be used.
///
/// # Errors
/// A GPU was asked for by its number, and it cannot be used.
pub fn choose(choice: DeviceChoice) -> Result<Chosen, DeviceError> {
    match choice {
        DeviceChoice::Cpu => Ok(Chosen::cpu("asked for")),
        DeviceChoice::Auto => Ok(automatic()),
        DeviceChoice::Cuda(number) => open(choice, number),
    }
}

#[cfg(not(feature = "cuda"))]
fn automatic() -> Chosen {
    Chosen::cpu("this binary was built without CUDA")
}

#[cfg(not(feature = "cuda"))]
fn open(choice: DeviceChoice, _: usize) -> Result<Chosen, DeviceError> {
    Err(DeviceError::NotBuilt(choice))
}

#[cfg(feature = "cuda")]
fn automatic() -> Chosen {
    open(DeviceChoice::Cuda(0), 0).unwrap_or_else(|error| {
        let text = error.to_string();
        let why = text.split_once("asked for, and ").map_or(text.as_str(), |(_, why)| why);
        Chosen::cpu(why)
    })
}

#[cfg(feature = "cuda")]
fn open(choice: DeviceChoice, number: usize) -> Result<Chosen, DeviceError> {
    use crate::ops::cuda::{self, Opened, Trouble};
    let Opened { device, name, capability, memory } = cuda::open(number).map_err(|trouble| match trouble {
        Trouble::NoDriver(problem) => DeviceError::NoDriver { choice, problem },
        Trouble::TooOld(version) => DeviceError::DriverTooOld { choice, version },
        Trouble::NoDevice(there) => DeviceError::NoDevice { choice, there },
        Trouble::Architecture(name, major, minor) => {
            DeviceError::Architecture { choice, name, capability: (major, minor) }
        }
        Trouble::Other(problem) => DeviceError::Other { choice, problem },
    })?;
    let (major, minor) = capability;
    let (free, total) = (crate::bytes::shown(memory.0), crate::bytes::shown(memory.1));
    let reason = format!("{choice}, {name}, compute capability {major}.{minor}, {free} of {total} free");
    Ok(Chosen { device, reason, free: Some(memory.0) })
}

/// Bytes that are free where `device` computes, where the system tells.
#[must_use]
pub fn available_memory(device: &Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::ops::cuda::free_memory(device).ok();
    }
    let _ = device;
    machine::available_memory()
}

/// The most bytes that were held at once, where the system tells: on a GPU those of tensors, else those of the process.
#[must_use]
pub fn peak_memory(device: &Device) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::ops::cuda::peak_memory(device, false).ok();
    }
    let _ = device;
    machine::peak_memory()
}

/// What a failed allocation means for whoever wrote the recipe; none where an error is another.
#[must_use]
pub fn out_of_memory(error: &candle_core::Error) -> Option<&'static str> {
    error.to_string().contains("OUT_OF_MEMORY").then_some(
        "`memory` above says what was planned: lower [train] micro_batch_tokens, then [data] max_length; or keep the base in fewer bits \
         ([model] quant = \"nf4\"); another program may hold some of it, see `nvidia-smi`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for (text, choice) in
            [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda:3", DeviceChoice::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", ""] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_auto_is_the_cpu_and_a_gpu_is_an_error() {
        let chosen = choose(DeviceChoice::Auto).expect("the CPU is there");
        assert!(chosen.device.is_cpu() && chosen.reason.contains("built without CUDA"), "{}", chosen.reason);
        let error = choose(DeviceChoice::Cuda(0)).expect_err("there is none");
        assert!(error.to_string().contains("built without CUDA"), "{error}");
    }

    #[test]
    fn messages_read_well() {
        let error = |there| DeviceError::NoDevice { choice: DeviceChoice::Cuda(2), there }.to_string();
        assert_eq!(error(0), "cuda:2 is asked for, and there is no GPU");
        assert_eq!(error(1), "cuda:2 is asked for, and there is only cuda:0");
        assert_eq!(error(2), "cuda:2 is asked for, and there are cuda:0 to cuda:1");
        let error = DeviceError::DriverTooOld { choice: DeviceChoice::Cuda(0), version: 12040 };
        assert!(error.to_string().contains("it knows CUDA 12.4, and"), "{error}");
        let full = candle_core::Error::Msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        assert!(out_of_memory(&full).is_some_and(|help| help.contains("micro_batch_tokens")));
        assert!(out_of_memory(&candle_core::Error::Msg("another".into())).is_none());
    }
}
