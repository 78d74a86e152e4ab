//! With the feature `cuda`: compiles the kernels in src/ops/cuda to PTX. Otherwise there is nothing to do.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// PTX for it runs on every GPU since.
const OLDEST: &str = "compute_80";
const KERNELS: &str = "src/ops/cuda";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed={KERNELS}");
    let nvcc = nvcc();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let kernels = fs::read_dir(KERNELS).expect("the kernels are beside their ops");
    for source in
        kernels.map(|entry| entry.expect("readable").path()).filter(|path| path.extension() == Some("cu".as_ref()))
    {
        let target = out.join(source.file_name().expect("it has one")).with_extension("ptx");
        compile(&nvcc, &source, &target);
    }
}

/// candle's own kernels need nvcc too, and find it in the same places.
fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    match env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")) {
        Some(nvcc) if nvcc.is_file() => nvcc,
        _ => "nvcc".into(),
    }
}

fn compile(nvcc: &Path, source: &Path, target: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["--ptx", "-arch", OLDEST, "-O3", "-std=c++17", "-o"]).arg(target).arg(source);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} failed on {} ({status})", nvcc.display(), source.display()),
        Err(error) => panic!(
            "{}: {error}. The feature `cuda` needs the CUDA toolkit's nvcc: on PATH, in $CUDA_HOME/bin, or as $NVCC; \
             `scripts/cuda_build` fetches one into a folder",
            nvcc.display()
        ),
    }
}
