//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Inside the program a tensor is `<module path>.lora_A`; PEFT's prefix and suffix exist in this file only.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use super::{AdapterError, Adapters, Dora, InitialWeights, Lora, LoraConfig, Targets};
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

/// DoRA's lengths; a name without `.weight`, which PEFT appends on loading.
fn magnitude_name(module: &str) -> String {
    format!("base_model.model.{module}.lora_magnitude_vector")
}

impl From<TensorFileError> for AdapterError {
    fn from(TensorFileError { file, problem, help }: TensorFileError) -> Self {
        Self::File { file, problem, help }
    }
}

/// Options of PEFT that change what an adapter computes and that are not read here.
const UNSUPPORTED: [&str; 14] = [
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
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
    if ["fine_tune_type", "lora_parameters"].iter().any(|key| config.get(key).is_some()) {
        let problem = "is of an MLX adapter, not of PEFT's";
        let help = "MLX keeps `lora_a` [in, rank] and `lora_b` [rank, out] and a `scale`; PEFT's files have them transposed, as \
                    base_model.model.PATH.lora_A.weight and lora_B.weight, with lora_alpha = scale * rank. mlx-lm's \
                    `fuse` writes a merged model, which can be a source";
        return Err(error(problem.into(), Some(help)));
    }
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
    if !is_rank(rank) {
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
    let flag = |key: &str| match get(key) {
        Value::Null => Ok(false),
        Value::Bool(flag) => Ok(*flag),
        value => Err(error(format!("`{key}` is {value}, not true or false"), None)),
    };
    let (rslora, dora) = (flag("use_rslora")?, flag("use_dora")?);
    if dora && dropout > 0.0 {
        return Err(error("use_dora is true, and lora_dropout is not 0".into(), Some(DORA_WITH_DROPOUT)));
    }
    let layers = match get("layers_to_transform") {
        Value::Null => None,
        Value::Number(_) | Value::Array(_) => {
            let listed = match get("layers_to_transform") {
                Value::Array(items) => items.clone(),
                one => vec![one.clone()],
            };
            let numbers = listed.iter().map(|item| Some(item.as_u64()? as usize)).collect::<Option<Vec<_>>>();
            let numbers =
                numbers.ok_or_else(|| error("`layers_to_transform` has no numbers of layers".into(), None))?;
            (!numbers.is_empty()).then_some(numbers)
        }
        value => return Err(error(format!("`layers_to_transform` is {value}, not numbers of layers"), None)),
    };
    let pattern = match get("layers_pattern") {
        Value::Array(names) => names.iter().all(|name| name == "layers"),
        value => value.is_null() || value == "layers",
    };
    if layers.is_some() && !pattern {
        return Err(error(format!("`layers_pattern` is {}, not \"layers\"", get("layers_pattern")), None));
    }
    let numbers = |key: &str| -> Result<Vec<(String, f64)>, AdapterError> {
        let entries = match get(key) {
            Value::Null => return Ok(Vec::new()),
            Value::Object(entries) => entries,
            value => return Err(error(format!("`{key}` is {value}, not numbers by pattern"), None)),
        };
        let number = |(pattern, value): (&String, &Value)| {
            let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
            Ok((pattern.clone(), number.ok_or_else(|| error(format!("`{key}` has {pattern:?}: {value}"), None))?))
        };
        entries.iter().map(number).collect()
    };
    let ranks = numbers("rank_pattern")?;
    if let Some((pattern, rank)) = ranks.iter().find(|(_, rank)| !is_rank(*rank)) {
        return Err(error(format!("`rank_pattern` has {pattern:?}: {rank}, not a rank"), None));
    }
    Ok(LoraConfig {
        rank: rank as usize,
        alpha,
        rslora,
        dora,
        dropout,
        targets,
        layers,
        ranks: ranks.into_iter().map(|(pattern, rank)| (pattern, rank as usize)).collect(),
        alphas: numbers("alpha_pattern")?,
        weights: InitialWeights::default(),
    })
}

/// Why DoRA goes without dropout.
pub const DORA_WITH_DROPOUT: &str =
    "under dropout the lengths of DoRA's rows belong to no one matrix: set [adapter] dropout = 0";

/// No useful rank comes near the largest; it bounds what a broken file can ask for.
fn is_rank(rank: f64) -> bool {
    rank.fract() == 0.0 && (1.0..=65536.0).contains(&rank)
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
    // the targets stand in the adapter's file, not in the recipe that the error would speak of
    let selected = config.select(modules).map_err(|e| AdapterError::File {
        file: folder.join(CONFIG_FILE),
        problem: match e {
            AdapterError::NoModule { target, .. } => {
                format!("`{target}` in target_modules or a pattern matches no module of the model")
            }
            AdapterError::BadPattern { pattern, .. } => {
                format!("{pattern:?} is no regular expression")
            }
            AdapterError::NoLayer { layer, last } => {
                format!("layers_to_transform names layer {layer}, and the model's last is {last}")
            }
            other => other.to_string(),
        },
        help: Some("the adapter was made for another base".into()),
    })?;
    let mut unused: BTreeMap<String, ()> = file.names().into_iter().map(|name| (name, ())).collect();
    let mut loras = Vec::with_capacity(modules.len());
    for (module, selected) in modules.iter().zip(selected) {
        let Some((rank, scale)) = selected else {
            loras.push(None);
            continue;
        };
        let mut read = |name: &str, shape: &[usize]| {
            unused.remove(name);
            file.read(name, shape, dtype)
        };
        let a = read(&tensor_name(&module.path, 'A'), &[rank, module.inputs])?;
        let b = read(&tensor_name(&module.path, 'B'), &[module.outputs, rank])?;
        let mut lora = Lora::new(&module.path, a, b, scale);
        if config.dora {
            let name = magnitude_name(&module.path);
            let saved = format!("{name}.weight");
            let name = if file.names().contains(&saved) { saved } else { name };
            lora.dora = Some(Dora { magnitude: read(&name, &[module.outputs])?, norms: None });
        }
        loras.push(Some(lora));
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

/// The trainable tensors of adapters like `adapters`, in their order, from a folder that [`save`] wrote of such.
///
/// # Errors
/// The file is missing or broken, or is of other adapters.
pub(crate) fn load_trainable(folder: &Path, adapters: &Adapters) -> Result<Vec<Tensor>, AdapterError> {
    let file = TensorFile::open(&folder.join(TENSORS_FILE))?;
    let mut tensors = Vec::new();
    for lora in adapters.iter() {
        // what is not trained stands behind it
        let rank = lora.own[0].dims()[0];
        let read = |name: &str, like: &Tensor| file.read(name, like.dims(), like.dtype());
        tensors.push(read(&tensor_name(&lora.module, 'A'), lora.a())?.narrow(0, 0, rank)?.contiguous()?);
        tensors.push(read(&tensor_name(&lora.module, 'B'), lora.b())?.narrow(1, 0, rank)?.contiguous()?);
        if let Some(magnitude) = lora.magnitude() {
            tensors.push(read(&magnitude_name(&lora.module), magnitude)?);
        }
    }
    Ok(tensors)
}

/// The bytes of `adapter_model.safetensors`: f32, under PEFT's names, the same for the same adapter.
///
/// # Errors
/// What candle returns.
pub fn tensor_bytes(adapters: &Adapters) -> Result<Vec<u8>, AdapterError> {
    let mut named = Vec::new();
    for lora in adapters.iter() {
        for (side, tensor) in [('A', lora.a()), ('B', lora.b())] {
            named.push((tensor_name(&lora.module, side), tensor.clone()));
        }
        named.extend(lora.magnitude().map(|magnitude| (magnitude_name(&lora.module), magnitude.clone())));
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

/// Ranks and alphas as PEFT has them: those of most modules, and by name those that are others.
struct Sizes {
    rank: usize,
    alpha: f64,
    ranks: Map<String, Value>,
    alphas: Map<String, Value>,
}

impl Sizes {
    fn of(adapters: &Adapters) -> Self {
        let config = adapters.config();
        let size = |lora: &Lora| (lora.rank(), config.alpha_of(lora.rank(), lora.scale));
        let all: Vec<(usize, f64)> = adapters.iter().map(size).collect();
        let count = |one: &(usize, f64)| all.iter().filter(|other| *other == one).count();
        // of two that are as frequent, the recipe's
        let own = |one: &(usize, f64)| *one == (config.rank, config.alpha);
        let (rank, alpha) =
            all.iter().copied().max_by_key(|one| (count(one), own(one))).unwrap_or((config.rank, config.alpha));
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for (lora, size) in adapters.iter().zip(&all) {
            let name = |lora: &Lora| lora.module.rsplit('.').next().unwrap_or_default().to_owned();
            let alike = adapters.iter().zip(&all).all(|(other, its)| name(other) != name(lora) || its == size);
            let key = if alike { name(lora) } else { lora.module.clone() };
            if size.0 != rank {
                ranks.insert(key.clone(), json!(size.0));
            }
            if size.1 != alpha {
                alphas.insert(key, whole(size.1));
            }
        }
        Self { rank, alpha, ranks, alphas }
    }
}

/// A number without a fraction as PEFT writes it.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

/// `adapter_config.json` as PEFT writes it: all of its keys, sorted, two blanks of indentation.
#[must_use]
pub fn config_json(adapters: &Adapters, base: &str) -> String {
    let LoraConfig { rslora, dora, dropout, targets, layers, .. } = adapters.config();
    let Sizes { rank, alpha, ranks, alphas } = Sizes::of(adapters);
    // what "all-linear" selects in this decoder, written out: readers match it without knowing the base
    let all = || {
        let mut names: Vec<&str> = Vec::new();
        for name in adapters.iter().map(|lora| lora.module().rsplit('.').next().unwrap_or_default()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    };
    // in a model of several parts, a name alone would also match the others
    let part = adapters.iter().next().and_then(|lora| lora.module().split_once(".layers.")).map(|(part, _)| part);
    let targets = match (targets, part.filter(|&part| part != "model")) {
        (Targets::Pattern(pattern), _) => json!(pattern),
        (_, Some(part)) => json!(format!(r"{}\.layers\.\d+\..*\.({})", regex::escape(part), all().join("|"))),
        (Targets::AllLinear, None) => json!(all()),
        (Targets::Names(names), None) => json!(names),
    };
    let config = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": alphas,
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
        "layers_to_transform": layers,
        "loftq_config": {},
        "lora_alpha": whole(alpha),
        "lora_bias": false,
        "lora_dropout": dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": dora,
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
    files::write(&folder.join(CONFIG_FILE), config_json(adapters, base).as_bytes())?;
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::Projection;

    fn modules() -> Vec<Module> {
        let path = |projection: Projection| format!("model.layers.0.{}", projection.name());
        Projection::ALL.map(|projection| Module { path: path(projection), inputs: 6, outputs: 5 }).to_vec()
    }

    /// An adapter whose `B` is not zero.
    fn adapters(targets: Targets) -> Adapters {
        let config =
            LoraConfig { rank: 3, alpha: 4.5, rslora: true, dropout: 0.25, targets, ..LoraConfig::default() };
        let mut adapters = crate::adapter::new(&config, &modules(), 1, DType::F32, &Device::Cpu).expect("made");
        let moved: Vec<Tensor> = adapters.tensors().map(|(_, tensor)| (tensor + 0.1).expect("moved")).collect();
        adapters.replace(moved).expect("replaced");
        adapters
    }

    /// An adapter folder as [`save`] writes it.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        save(&adapters(Targets::AllLinear), "base", folder.path()).expect("written");
        folder
    }

    fn put(folder: &Path, tensors: &[(String, Tensor)]) {
        fs::write(folder.join(TENSORS_FILE), serialize(tensors).expect("serialised")).expect("written");
    }

    /// File name, problem and help of the error of loading a folder.
    fn error(folder: &Path) -> (String, String, String) {
        match load(folder, &modules(), DType::F32).expect_err("something is wrong with it") {
            AdapterError::File { file, problem, help } => {
                let name = file.strip_prefix(folder).expect("in the folder").display().to_string();
                (name, problem, help.unwrap_or_default())
            }
            other => panic!("{other}"),
        }
    }

    fn config_problem(key: &str, value: Value) -> String {
        let folder = folder();
        let file = folder.path().join(CONFIG_FILE);
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).expect("read")).expect("JSON");
        config[key] = value;
        fs::write(file, config.to_string()).expect("written");
        let (file, problem, _) = error(folder.path());
        assert_eq!(file, CONFIG_FILE);
        problem
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let names = Targets::Names(vec!["q_proj".into(), "down_proj".into()]);
        for targets in [Targets::AllLinear, names, Targets::Pattern(r".*\.mlp\..*".into())] {
            let saved = adapters(targets);
            let folder = tempfile::tempdir().expect("a folder");
            save(&saved, "base", folder.path()).expect("written");
            let loaded = load(folder.path(), &modules(), DType::F32).expect("loaded");
            let LoraConfig { rank, alpha, rslora, dropout, .. } = loaded.config();
            assert_eq!((*rank, *alpha, *rslora, *dropout), (3, 4.5, true, 0.25));
            let values = |adapters: &Adapters| -> Vec<_> {
                adapters.tensors().map(|(name, tensor)| (name, tensor.to_vec2::<f32>().expect("f32"))).collect()
            };
            assert_eq!(values(&loaded), values(&saved));
        }
    }

    #[test]
    fn an_adapter_that_is_no_plain_lora_is_refused_by_option() {
        for key in UNSUPPORTED {
            let problem = config_problem(key, json!({"on": true}));
            assert_eq!(problem, format!("`{key}` is {{\"on\":true}}, which is not supported"));
        }
        for (key, value, expected) in [
            ("peft_type", json!("IA3"), "peft_type is \"IA3\", not \"LORA\""),
            ("bias", json!("lora_only"), "bias is \"lora_only\", not \"none\""),
            (
                "init_lora_weights",
                json!("pissa"),
                "init_lora_weights is \"pissa\", which changed the base it belongs to",
            ),
            ("r", json!(0), "`r` is 0, not a rank"),
            ("r", json!(2.5), "`r` is 2.5, not a rank"),
            ("r", json!(1e300), "`r` is 1000000000000000"),
            ("r", json!("8"), "`r` is \"8\", not a number"),
            ("lora_alpha", json!(-1), "`lora_alpha` is -1, not above zero"),
            ("lora_dropout", json!(1), "`lora_dropout` is 1, not a share"),
            ("use_rslora", json!("true"), "`use_rslora` is \"true\", not true or false"),
            ("target_modules", Value::Null, "`target_modules` is missing"),
            ("target_modules", json!([]), "`target_modules` is [], not names or a pattern"),
            ("target_modules", json!(["lm_head"]), "`lm_head` in target_modules or a pattern matches no module"),
            ("target_modules", json!("q_(proj"), "\"q_(proj\" is no regular expression"),
            ("use_dora", json!(true), "use_dora is true, and lora_dropout is not 0"),
            ("layers_to_transform", json!([7]), "layers_to_transform names layer 7, and the model's last is 0"),
            ("layers_to_transform", json!("all"), "`layers_to_transform` is \"all\", not numbers"),
            ("rank_pattern", json!({"q_proj": 2.5}), "`rank_pattern` has \"q_proj\": 2.5, not a rank"),
            ("rank_pattern", json!({"w_proj": 2}), "`w_proj` in target_modules or a pattern matches no module"),
            ("alpha_pattern", json!({"q_proj": -1}), "`alpha_pattern` has \"q_proj\": -1"),
            ("fine_tune_type", json!("lora"), "is of an MLX adapter"),
        ] {
            let problem = config_problem(key, value);
            assert!(problem.starts_with(expected), "{problem}");
        }
    }

    #[test]
    fn a_tensor_that_is_missing_left_over_or_of_another_shape_is_named() {
        let adapters = adapters(Targets::AllLinear);
        let named = |(name, tensor): (String, &Tensor)| (format!("base_model.model.{name}.weight"), tensor.clone());
        let tensors: Vec<_> = adapters.tensors().map(named).collect();
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        assert_eq!(tensors[0].0, name);
        let folder = folder();

        put(folder.path(), &tensors[1..]);
        let (file, problem, _) = error(folder.path());
        assert_eq!((file.as_str(), problem), (TENSORS_FILE, format!("has no tensor `{name}`")));

        let extra = ("base_model.model.lm_head.weight".to_owned(), tensors[0].1.clone());
        put(folder.path(), &[tensors.clone(), vec![extra]].concat());
        let (_, problem, _) = error(folder.path());
        assert_eq!(problem, "tensor `base_model.model.lm_head.weight` belongs to no targeted module of this model");

        let mut turned = tensors;
        turned[0].1 = turned[0].1.t().and_then(|t| t.contiguous()).expect("turned");
        put(folder.path(), &turned);
        let (_, problem, _) = error(folder.path());
        assert_eq!(problem, format!("tensor `{name}` is [6, 3], not [3, 6]"));
    }

    #[test]
    fn a_file_that_is_not_the_one_it_should_be_is_named() {
        for name in [CONFIG_FILE, TENSORS_FILE] {
            let folder = folder();
            let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1048576\n";
            fs::write(folder.path().join(name), pointer).expect("written");
            let (file, problem, help) = error(folder.path());
            assert_eq!((file.as_str(), problem.as_str()), (name, "is a Git-LFS pointer, not the file itself"));
            assert!(help.contains("git lfs pull"));
            fs::remove_file(folder.path().join(name)).expect("removed");
            assert_eq!(error(folder.path()).1, "does not exist");
        }
        let folder = folder();
        fs::rename(folder.path().join(TENSORS_FILE), folder.path().join("adapter_model.bin")).expect("renamed");
        let (file, problem, help) = error(folder.path());
        assert_eq!(file, "adapter_model.bin");
        assert!(problem.contains("pickles can run code") && help.contains("save_pretrained"), "{problem}");
        let config = folder.path().join(CONFIG_FILE);
        let problem = load(&config, &modules(), DType::F32).expect_err("a file").to_string();
        assert!(problem.ends_with("is no adapter folder"), "{problem}");
    }
}
