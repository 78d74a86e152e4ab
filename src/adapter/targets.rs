//! `[adapter] targets`, read as PEFT reads `target_modules`.

use std::fmt;

use regex::Regex;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::AdapterError;
use crate::model::Module;
use crate::suggest::did_you_mean;

/// Which linear modules carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Every linear module but the head.
    AllLinear,
    /// Modules whose path is one of the names or ends in `.` and one of them.
    Names(Vec<String>),
    /// Modules whose whole path the regular expression matches.
    Pattern(String),
}

impl Targets {
    /// For each of `modules`, whether it carries an adapter.
    ///
    /// # Errors
    /// A pattern that does not parse, or a name or pattern that matches nothing: a typing mistake would otherwise train
    /// less than was asked for.
    pub fn select(&self, modules: &[Module]) -> Result<Vec<bool>, AdapterError> {
        match self {
            Self::AllLinear => Ok(vec![true; modules.len()]),
            Self::Names(names) => {
                let named = |module: &Module, name: &str| {
                    module.path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                };
                for name in names {
                    if !modules.iter().any(|module| named(module, name)) {
                        return Err(no_module(name, modules));
                    }
                }
                Ok(modules.iter().map(|module| names.iter().any(|name| named(module, name))).collect())
            }
            Self::Pattern(pattern) => {
                let regex = regex(pattern, &format!("^(?:{pattern})$"))?;
                let selected: Vec<bool> = modules.iter().map(|module| regex.is_match(&module.path)).collect();
                if selected.contains(&true) { Ok(selected) } else { Err(no_module(pattern, modules)) }
            }
        }
    }
}

fn regex(pattern: &str, whole: &str) -> Result<Regex, AdapterError> {
    Regex::new(whole)
        .map_err(|error| AdapterError::BadPattern { pattern: pattern.to_owned(), help: error.to_string() })
}

/// The number of the layer that a module is in.
pub(super) fn layer(path: &str) -> Option<usize> {
    path.split_once(".layers.")?.1.split('.').next()?.parse().ok()
}

/// For each module the value of the first pattern that its path, or the end of it from a dot on, matches.
pub(super) fn patterns<T: Copy>(
    patterns: &[(String, T)],
    modules: &[Module],
    selected: &[bool],
) -> Result<Vec<Option<T>>, AdapterError> {
    let compiled: Vec<(Regex, T)> = patterns
        .iter()
        .map(|(pattern, value)| Ok((regex(pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, *value)))
        .collect::<Result<_, AdapterError>>()?;
    for ((regex, _), (pattern, _)) in compiled.iter().zip(patterns) {
        if !modules.iter().zip(selected).any(|(module, selected)| *selected && regex.is_match(&module.path)) {
            return Err(no_module(pattern, modules));
        }
    }
    let of = |module: &Module| Some(compiled.iter().find(|(regex, _)| regex.is_match(&module.path))?.1);
    Ok(modules.iter().map(of).collect())
}

fn no_module(target: &str, modules: &[Module]) -> AdapterError {
    let mut names: Vec<&str> = modules.iter().map(|m| m.path.rsplit('.').next().unwrap_or(&m.path)).collect();
    names.dedup();
    names.sort_unstable();
    names.dedup();
    let help = if ["lm_head", "embed_tokens"].contains(&target) {
        format!("adapters sit on the layers' linear modules: {}", names.join(", "))
    } else {
        let meant = did_you_mean(target, names.iter().copied()).map(|name| format!("did you mean `{name}`? "));
        format!(
            "{}names are {}; a string is a regular expression for a whole path like {}",
            meant.unwrap_or_default(),
            names.join(", "),
            modules.first().map_or("", |module| &module.path),
        )
    };
    AdapterError::NoModule { target: target.to_owned(), help }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllLinear => f.write_str("all-linear"),
            Self::Names(names) => f.write_str(&names.join(", ")),
            Self::Pattern(pattern) => write!(f, "/{pattern}/"),
        }
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str("all-linear"),
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern(pattern) => serializer.serialize_str(pattern),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Targets;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"all-linear\", a list of module names, or a regular expression")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Targets, E> {
                Ok(match text {
                    "all-linear" => Targets::AllLinear,
                    "" => return Err(E::custom("targets name no module")),
                    pattern => Targets::Pattern(pattern.to_owned()),
                })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Targets, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = items.next_element::<String>()? {
                    names.push(name);
                }
                if names.is_empty() || names.iter().any(String::is_empty) {
                    return Err(serde::de::Error::custom("targets name no module"));
                }
                Ok(Targets::Names(names))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<Module> {
        ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
            .iter()
            .flat_map(|name| {
                (0..2).map(move |layer| Module {
                    path: format!("model.layers.{layer}.{name}"),
                    inputs: 4,
                    outputs: 4,
                })
            })
            .collect()
    }

    #[test]
    fn names_match_whole_path_parts_as_peft_does() {
        let names = |names: &[&str]| Targets::Names(names.iter().map(ToString::to_string).collect());
        let selected = names(&["q_proj", "model.layers.1.mlp.up_proj"]).select(&modules()).expect("both match");
        assert_eq!(selected, [true, true, false, false, false, true]);
        // `proj` is the end of a name but no part of a path
        assert!(names(&["proj"]).select(&modules()).is_err());
        let error = names(&["q_porj"]).select(&modules()).expect_err("a typing mistake");
        let AdapterError::NoModule { help, .. } = error else { panic!("{error}") };
        assert!(help.contains("did you mean `q_proj`"), "{help}");
    }

    #[test]
    fn a_pattern_has_to_match_the_whole_path() {
        let pattern = |text: &str| Targets::Pattern(text.into()).select(&modules());
        let selected = pattern(r"model\.layers\.0\..*_proj").expect("it matches");
        assert_eq!(selected, [true, false, true, false, true, false]);
        assert!(pattern("q_proj").is_err());
        assert!(matches!(pattern("q_(proj"), Err(AdapterError::BadPattern { .. })));
    }
}
