//! dpo-lora
pub mod adapter;
pub mod data;
pub mod files;
pub mod model;
pub mod ops;
pub mod progress;
pub mod range;
mod suggest;
pub mod tensor_file;
