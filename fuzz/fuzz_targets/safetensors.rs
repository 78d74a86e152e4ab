//! `model.safetensors` of any bytes.
#![no_main]

#[path = "../../tests/hostile/model_files.rs"]
#[allow(dead_code)]
mod model_files;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model_files::read("model.safetensors", bytes);
});
