//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Inside the program a tensor is `<module path>.lora_A`; PEFT's prefix and suffix exist in this file only.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::{AdapterError, Adapters, Lora, LoraConfig, Targets};
use crate::files::{self, WriteError};
use crate::model::Module;
use crate::tensor_file::{TensorFile, TensorFileError, read_text};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file name.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// The version whose files these are.
const PEFT_VERSION: &str = "0.21.2";

fn tensor_name(module: &str, side: char) -> String {
    format!("base_model.model.{module}.lora_{side}.weight")
}

impl From<TensorFileError> for AdapterError {
    fn from(TensorFileError { file, problem, help }: TensorFileError) -> Self {
        Self::File { file, problem, help }
    }
}

/// Options of PEFT that change what an adapter computes and that are not read here.
const UNSUPPORTED: [&str; 18] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "layers_to_transform",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
];

/// Whether an option has a value that means "off".
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

/// Reads `adapter_config.json`.
///
/// # Errors
/// The file is missing or broken, or asks for a kind of adapter that is not a plain LoRA.
pub fn load_config(folder: &Path) -> Result<LoraConfig, AdapterError> {
    let file = folder.join(CONFIG_FILE);
    let error = |problem: String, help: Option<&str>| AdapterError::File {
        file: file.clone(),
        problem,
        help: help.map(ToOwned::to_owned),
    };
    if !folder.is_dir() {
        let help =
            Some("[adapter] init names a folder with adapter_config.json and adapter_model.safetensors".into());
        let problem = "is no adapter folder".into();
        return Err(AdapterError::File { file: folder.to_owned(), problem, help });
    }
    let text = read_text(&file)?;
    let config: Value = serde_json::from_str(&text).map_err(|e| error(format!("is no JSON: {e}"), None))?;
    let get = |key: &str| config.get(key).unwrap_or(&Value::Null);
    if get("peft_type") != "LORA" {
        return Err(error(format!("peft_type is {}, not \"LORA\"", get("peft_type")), None));
    }
    for key in UNSUPPORTED {
        if !is_off(get(key)) {
            let problem = format!("`{key}` is {}, which is not supported", get(key));
            return Err(error(problem, Some("only plain LoRA adapters can be started from")));
        }
    }
    if !(get("bias").is_null() || get("bias") == "none") {
        let help = "with trained biases the base without its adapter is no longer the reference";
        return Err(error(format!("bias is {}, not \"none\"", get("bias")), Some(help)));
    }
    let plain_init = match get("init_lora_weights") {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => ["gaussian", "default"].contains(&name.to_lowercase().as_str()),
        _ => false,
    };
    if !plain_init {
        let problem =
            format!("init_lora_weights is {}, which changed the base it belongs to", get("init_lora_weights"));
        return Err(error(
            problem,
            Some("convert it to a plain LoRA in PEFT first (path_initial_model_for_weight_conversion)"),
        ));
    }
    let number = |key: &str, default: f64| match get(key) {
        Value::Null => Ok(default),
        value => value.as_f64().ok_or_else(|| error(format!("`{key}` is {value}, not a number"), None)),
    };
    let rank = number("r", 8.0)?;
    // no useful rank comes near this; it bounds what a broken file can ask for
    if !(rank.fract() == 0.0 && (1.0..=65536.0).contains(&rank)) {
        return Err(error(format!("`r` is {rank}, not a rank"), None));
    }
    let alpha = number("lora_alpha", 8.0)?;
    if !(alpha.is_finite() && alpha > 0.0) {
        return Err(error(format!("`lora_alpha` is {alpha}, not above zero"), None));
    }
    let dropout = number("lora_dropout", 0.0)?;
    if !(0.0..1.0).contains(&dropout) {
        return Err(error(format!("`lora_dropout` is {dropout}, not a share"), None));
    }
    let targets = match get("target_modules") {
        Value::Null => return Err(error("`target_modules` is missing".into(), None)),
        value => serde_json::from_value::<Targets>(value.clone())
            .map_err(|_| error(format!("`target_modules` is {value}, not names or a pattern"), None))?,
    };
    let rslora = matches!(get("use_rslora"), Value::Bool(true));
    Ok(LoraConfig { rank: rank as usize, alpha, rslora, dropout, targets })
}

/// Reads an adapter for a model with `modules`, as `dtype` on the CPU.
///
/// # Errors
/// A file is missing or broken; a tensor is missing, left over, or of another shape than the model and the rank give.
pub fn load(folder: &Path, modules: &[Module], dtype: DType) -> Result<Adapters, AdapterError> {
    let config = load_config(folder)?;
    for pickle in ["adapter_model.bin", "adapters.npz"] {
        if folder.join(pickle).exists() && !folder.join(TENSORS_FILE).exists() {
            let help = "load it in PEFT and save it again: save_pretrained writes safetensors";
            return Err(AdapterError::File {
                file: folder.join(pickle),
                problem: "is not a safetensors file; pickles can run code and are not read".into(),
                help: Some(help.into()),
            });
        }
    }
    let file = TensorFile::open(&folder.join(TENSORS_FILE))?;
    let selected = config.targets.select(modules)?;
    let mut unused: BTreeMap<String, ()> = file.names().into_iter().map(|name| (name, ())).collect();
    let mut loras = Vec::with_capacity(modules.len());
    for (module, selected) in modules.iter().zip(selected) {
        if !selected {
            loras.push(None);
            continue;
        }
        let mut read = |side: char, shape: [usize; 2]| {
            let name = tensor_name(&module.path, side);
            unused.remove(&name);
            file.read(&name, &shape, dtype)
        };
        loras.push(Some(Lora {
            a: read('A', [config.rank, module.inputs])?,
            b: read('B', [module.outputs, config.rank])?,
            module: module.path.clone(),
            scale: config.scale(),
        }));
    }
    if let Some((name, ())) = unused.pop_first() {
        return Err(AdapterError::File {
            file: file.path().to_owned(),
            problem: format!("tensor `{name}` belongs to no targeted module of this model"),
            help: Some("the adapter was made for another base, or target_modules does not name all it holds".into()),
        });
    }
    Ok(Adapters { config, modules: loras })
}

/// The bytes of `adapter_model.safetensors`: f32, under PEFT's names, the same for the same adapter.
///
/// # Errors
/// What candle returns.
pub fn tensor_bytes(adapters: &Adapters) -> Result<Vec<u8>, AdapterError> {
    let mut named = Vec::new();
    for lora in adapters.iter() {
        for (side, tensor) in [('A', &lora.a), ('B', &lora.b)] {
            named.push((tensor_name(&lora.module, side), tensor.clone()));
        }
    }
    Ok(serialize(&named)?)
}

/// Tensors as safetensors bytes in f32, with the metadata transformers asks for.
pub(crate) fn serialize(named: &[(String, Tensor)]) -> Result<Vec<u8>, candle_core::Error> {
    let mut data = Vec::with_capacity(named.len());
    for (name, tensor) in named {
        let values = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        data.push((name, tensor.dims().to_vec(), bytes));
    }
    let views = data
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(candle_core::Error::wrap)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::wrap)
}

/// `adapter_config.json` as PEFT writes it: all of its keys, sorted, two blanks of indentation.
#[must_use]
pub fn config_json(config: &LoraConfig, base: &str) -> String {
    let LoraConfig { rank, alpha, rslora, dropout, targets } = config;
    // what "all-linear" selects in this decoder, written out: readers match it without knowing the base
    let all = || crate::model::Projection::ALL.map(|p| p.name().rsplit('.').next().unwrap_or_default());
    let targets = match targets {
        Targets::AllLinear => json!(all()),
        Targets::Names(names) => json!(names),
        Targets::Pattern(pattern) => json!(pattern),
    };
    let alpha = if alpha.fract() == 0.0 && alpha.abs() < 1e15 { json!(*alpha as i64) } else { json!(alpha) };
    let config = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": {},
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": rslora,
    });
    format!("{config:#}")
}

/// Writes both files into `folder`, which exists.
///
/// # Errors
/// What candle or the system returns.
pub fn save(adapters: &Adapters, base: &str, folder: &Path) -> Result<(), SaveError> {
    files::write(&folder.join(CONFIG_FILE), config_json(adapters.config(), base).as_bytes())?;
    files::write(&folder.join(TENSORS_FILE), &tensor_bytes(adapters)?)?;
    Ok(())
}

/// Why an adapter could not be written.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum SaveError {
    /// The system.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Write(#[from] WriteError),
    /// The tensors.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Adapter(#[from] AdapterError),
}
