//! Rope's tables from a config.
//!
//! transformers 5 writes `rope_parameters` with everything in it, by the type of layer where there are several; before,
//! `rope_theta` stood beside `rope_scaling`.

use serde_json::Value;

use super::ConfigJson;
use crate::model::{ModelError, Rope};

impl ConfigJson {
    /// The table of all layers. `theta` is the family's default.
    pub(super) fn rope(&self, head_dim: usize, theta: f64) -> Result<Rope, ModelError> {
        let scaling = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Value::Null, scaling) => scaling,
            (parameters, _) => parameters,
        };
        let given = scaling.get("rope_theta").unwrap_or_else(|| self.get("rope_theta"));
        let partial = scaling.get("partial_rotary_factor").unwrap_or_else(|| self.get("partial_rotary_factor"));
        if partial.as_f64().unwrap_or(1.0) != 1.0 {
            let problem = format!("`partial_rotary_factor` is {partial}");
            return Err(self.error(problem, Some("rope over a part of each head is not supported".into())));
        }
        let theta = self.theta(given, theta)?;
        self.scaled_rope(head_dim, theta, scaling)
    }

    /// Gemma 3's two tables: of layers that see everything, and of layers with a window.
    pub(super) fn global_and_local_rope(&self, head_dim: usize) -> Result<[Rope; 2], ModelError> {
        const GLOBAL: f64 = 1e6;
        const LOCAL: f64 = 1e4;
        let parameters = self.get("rope_parameters");
        if let (Some(global), Some(local)) = (parameters.get("full_attention"), parameters.get("sliding_attention")) {
            let table = |of: &Value, default| {
                let theta = self.theta(of.get("rope_theta").unwrap_or(&Value::Null), default)?;
                self.scaled_rope(head_dim, theta, of)
            };
            return Ok([table(global, GLOBAL)?, table(local, LOCAL)?]);
        }
        let local = self.theta(self.get("rope_local_base_freq"), LOCAL)?;
        Ok([self.rope(head_dim, GLOBAL)?, self.scaled_rope(head_dim, local, &Value::Null)?])
    }

    fn theta(&self, given: &Value, default: f64) -> Result<f64, ModelError> {
        match given {
            Value::Null => Ok(default),
            theta => theta
                .as_f64()
                .filter(|t| t.is_finite() && *t > 0.0)
                .ok_or_else(|| self.error(format!("`rope_theta` is {theta}, not above zero"), None)),
        }
    }

    /// Inverse frequencies `theta^(−2j/E)`, `j < E/2`, with what `scaling` does to them.
    fn scaled_rope(&self, head_dim: usize, theta: f64, scaling: &Value) -> Result<Rope, ModelError> {
        let plain = |j: usize| theta.powf(-((2 * j) as f64) / head_dim as f64);
        let frequencies = || (0..head_dim / 2).map(|j| f64::from(plain(j) as f32));
        let rope_type = scaling.get("rope_type").or_else(|| scaling.get("type"));
        let parameter = |key: &str| {
            scaling
                .get(key)
                .and_then(Value::as_f64)
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| self.error(format!("rope scaling needs `{key}`, a number above zero"), None))
        };
        let (mut factor, mut long) = (1.0, None);
        let scaled: Vec<f64> = match rope_type.and_then(Value::as_str) {
            None | Some("default") => frequencies().collect(),
            Some("linear") => {
                let factor = parameter("factor")?;
                frequencies().map(|f| f / factor).collect()
            }
            Some("llama3") => {
                let (factor, low, high) =
                    (parameter("factor")?, parameter("low_freq_factor")?, parameter("high_freq_factor")?);
                let context = parameter("original_max_position_embeddings")?;
                frequencies().map(|f| llama3(f, factor, low, high, context)).collect()
            }
            Some("longrope" | "su") => {
                let original = scaling.get("original_max_position_embeddings");
                let original = original.unwrap_or_else(|| self.get("original_max_position_embeddings")).as_u64();
                let original = original.filter(|&n| n > 1).ok_or_else(|| {
                    self.error("longrope needs `original_max_position_embeddings`, a length".into(), None)
                })?;
                let longest = self.size_or("max_position_embeddings", original as usize)? as f64;
                let stretch = longest / original as f64;
                factor = match scaling.get("attention_factor").and_then(Value::as_f64) {
                    Some(factor) => factor,
                    None if stretch <= 1.0 => 1.0,
                    None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
                };
                let divided = |key: &str| -> Result<Vec<f64>, ModelError> {
                    let error = || {
                        let problem = format!("longrope needs `{key}`, {} numbers above zero", head_dim / 2);
                        self.error(problem, None)
                    };
                    let factors = scaling.get(key).and_then(Value::as_array).ok_or_else(error)?;
                    let number = |x: &Value| x.as_f64().filter(|x| x.is_finite() && *x > 0.0);
                    let factors: Option<Vec<f64>> = factors.iter().map(number).collect();
                    let factors = factors.filter(|f| f.len() == head_dim / 2).ok_or_else(error)?;
                    // transformers: 1 / (factor · theta^(2j/E)), in f32
                    let one = |(j, factor): (usize, f64)| f64::from(1.0 / (factor as f32 * (1.0 / plain(j)) as f32));
                    Ok(factors.into_iter().enumerate().map(one).collect())
                };
                long = Some((original as usize, single(divided("long_factor")?)));
                divided("short_factor")?
            }
            Some(other) => {
                let help = "supported: default, linear, llama3, longrope".to_owned();
                return Err(self.error(format!("rope scaling `{other}` is not supported"), Some(help)));
            }
        };
        Ok(Rope { theta, inverse_frequencies: single(scaled), factor: factor as f32, long })
    }
}

fn single(frequencies: Vec<f64>) -> Vec<f32> {
    frequencies.into_iter().map(|f| f as f32).collect()
}

/// Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, context: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength > context / low {
        frequency / factor
    } else if wavelength < context / high {
        frequency
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
