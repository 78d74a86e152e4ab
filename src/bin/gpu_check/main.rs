//! Whether a GPU computes what the CPU does, and how fast. `scripts/gpu_check` runs it on a machine with a GPU; on one
//! without, `scripts/cuda_on_cpu` lends it a device that is this machine's CPU.
//!
//! ```text
//! gpu_check [--small] [--seed N] [--recipe FILE] [--skip PART]...       parts: kernels, gradients, recipe, timings, shapes
//! ```
//!
//! Everything is random under a seed that is printed. Outputs are NaN before a kernel writes them. Exit code 3: something
//! differs by more than it may.

mod kernels;
mod models;
mod timings;

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::{DType, Device, Result, Tensor};
use clap::Parser;
use dpo_lora::device::{self, DeviceChoice};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What was compared, by how much it differs, and by how much it may.
#[derive(Debug)]
pub(crate) struct Line {
    what: String,
    found: f64,
    most: f64,
}

/// The lines of the table, and the random numbers.
#[derive(Debug)]
pub(crate) struct Check {
    device: Device,
    rng: ChaCha8Rng,
    lines: Vec<Line>,
    small: bool,
    recipe: Option<String>,
}

impl Check {
    /// Standard normal numbers on the CPU, in f64 but such that `dtype` has them.
    pub(crate) fn normal(&mut self, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
        let shape = shape.into();
        let mut uniform = || (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let values: Vec<f64> = (0..shape.elem_count())
            .map(|_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?.to_dtype(dtype)?.to_dtype(DType::F64)
    }

    /// A tensor on the GPU, in `dtype`.
    pub(crate) fn there(&self, tensor: &Tensor, dtype: DType) -> Result<Tensor> {
        tensor.to_dtype(dtype)?.to_device(&self.device)
    }

    /// Notes how far `found`, of the GPU, is from `right`: the norm of the difference over the norm.
    pub(crate) fn compare(
        &mut self,
        what: impl Into<String>,
        found: &Tensor,
        right: &Tensor,
        most: f64,
    ) -> Result<()> {
        let what = what.into();
        let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
        let right = right.to_dtype(DType::F64)?.flatten_all()?;
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
        let difference = norm(&(found - &right)?)?;
        let size = norm(&right)?;
        self.note(what, if difference == 0.0 { 0.0 } else { difference / size }, most);
        Ok(())
    }

    /// Notes a number that may be `most`.
    pub(crate) fn note(&mut self, what: impl Into<String>, found: f64, most: f64) {
        let line = Line { what: what.into(), found, most };
        if !line.holds() {
            eprintln!("  {} differs by {:.2e}, more than {:.0e}", line.what, line.found, line.most);
        }
        self.lines.push(line);
    }
}

impl Line {
    /// Not a number is more than anything.
    fn holds(&self) -> bool {
        self.found <= self.most
    }
}

/// By how much a result may differ, relative by norm.
fn tolerance(dtype: DType) -> f64 {
    // sums are f32 in both: an f32 result is off by some of its last bits, a bf16 result by its own rounding, 2^-9
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

/// What a GPU has to show.
#[derive(Debug, Parser)]
struct Arguments {
    /// Sizes that a device which is this CPU gets through.
    #[arg(long)]
    small: bool,
    /// Where random numbers begin [default: another place each time].
    #[arg(long)]
    seed: Option<u64>,
    /// The recipe that is run on both [default: recipes/quickstart.toml].
    #[arg(long, value_name = "FILE")]
    recipe: Option<String>,
    /// A part to leave out.
    #[arg(long, value_parser = ["kernels", "gradients", "recipe", "timings", "shapes"])]
    skip: Vec<String>,
}

fn main() -> ExitCode {
    dpo_lora::allocator::keep_freed_memory();
    let Arguments { small, seed, recipe, skip } = Arguments::parse();
    let chosen = match device::choose(DeviceChoice::Cuda(0)) {
        Ok(chosen) => chosen,
        Err(error) => {
            eprintln!("{:?}", miette::Report::new(error));
            return ExitCode::from(2);
        }
    };
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let seed = seed.unwrap_or_else(now);
    eprintln!("{}\nseed {seed}", chosen.reason);
    let device = chosen.device;
    let mut check = Check { device, rng: ChaCha8Rng::seed_from_u64(seed), lines: Vec::new(), small, recipe };
    type Part = fn(&mut Check) -> std::result::Result<(), String>;
    let parts: [(&str, Part); 5] = [
        ("kernels", |check| kernels::all(check).map_err(|e| e.to_string())),
        ("gradients", models::gradients),
        ("recipe", models::recipe),
        ("timings", timings::all),
        ("shapes", models::shapes),
    ];
    let mut failed = false;
    for (name, part) in parts {
        if skip.iter().any(|skipped| skipped == name) {
            continue;
        }
        eprintln!("{name} ...");
        if let Err(error) = part(&mut check) {
            eprintln!("  {name}: {error}");
            failed = true;
        }
    }
    report(&check.lines);
    if failed || check.lines.iter().any(|line| !line.holds()) { ExitCode::from(3) } else { ExitCode::SUCCESS }
}

/// The table, on stdout.
fn report(lines: &[Line]) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    for line in lines {
        let verdict = if line.holds() { "ok" } else { "WRONG" };
        let _ = writeln!(out, "{:<58}{:>12.2e}{:>10.0e}  {verdict}", line.what, line.found, line.most);
    }
    let wrong = lines.iter().filter(|line| !line.holds()).count();
    let _ = writeln!(out, "{} compared, {wrong} wrong", lines.len());
}
