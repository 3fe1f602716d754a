//! `adapter_config.json` as it is written.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

use serde::Serialize;

use super::{AdapterWeights, Profile, key::ends};
use crate::{BiasMode, config::integer_if_whole};

/// The fields that every reader since PEFT 0.6 knows, in the order of their names.
#[derive(Serialize)]
pub(super) struct ConfigFile {
    alpha_pattern: BTreeMap<String, Number>,
    base_model_name_or_path: Option<String>,
    bias: BiasMode,
    /// Since PEFT 0.14, so written only where it is needed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    exclude_modules: Vec<String>,
    fan_in_fan_out: bool,
    inference_mode: bool,
    init_lora_weights: bool,
    layers_pattern: Option<()>,
    layers_to_transform: Option<()>,
    lora_alpha: Number,
    /// Since PEFT 0.14, as above.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    lora_bias: bool,
    lora_dropout: f64,
    modules_to_save: Option<Vec<String>>,
    peft_type: &'static str,
    r: usize,
    rank_pattern: BTreeMap<String, usize>,
    revision: Option<String>,
    target_modules: Vec<String>,
    task_type: Option<String>,
    use_dora: bool,
    use_rslora: bool,
}

#[derive(Clone, Copy, Serialize)]
#[serde(transparent)]
struct Number(#[serde(serialize_with = "integer_if_whole")] f64);

impl ConfigFile {
    /// Describes an adapter. The commonest rank and alpha are the default; a layer with others
    /// gets a pattern of its own.
    pub fn of(adapter: &AdapterWeights, profile: Profile) -> Self {
        let layers = &adapter.layers;
        let rslora = !layers.is_empty() && layers.values().all(|layer| layer.rslora);
        // The flag is the whole file's. Where only some layers have it, theirs becomes alpha · √r.
        let alphas: Vec<(&str, f64)> = layers
            .iter()
            .map(|(path, layer)| {
                let root = if layer.rslora && !rslora {
                    (layer.rank() as f64).sqrt()
                } else {
                    1.0
                };
                (path.as_str(), layer.alpha * root)
            })
            .collect();
        let rank = commonest(layers.values().map(|layer| layer.rank())).unwrap_or(1);
        let alpha = commonest(alphas.iter().map(|(_, alpha)| alpha.to_bits()));
        let alpha = alpha.map_or(1.0, f64::from_bits);
        let only = |path: &str| format!("^{}$", regex::escape(path));
        let target_modules: Vec<String> = match profile {
            Profile::Peft => layers.keys().cloned().collect(),
            Profile::Universal => {
                let mut leaves: Vec<_> = layers.keys().map(|path| leaf(path).to_string()).collect();
                leaves.sort();
                leaves.dedup();
                leaves
            }
        };
        // PEFT takes a target for the end of a path, so layers that end like an adapted one must
        // be excluded.
        let mut exclude_modules: Vec<String> = match profile {
            Profile::Peft => {
                let meant = |path: &&String| ends(path).any(|end| layers.contains_key(end));
                adapter.excluded.iter().filter(meant).cloned().collect()
            }
            Profile::Universal => Vec::new(),
        };
        exclude_modules.sort();
        exclude_modules.dedup();
        Self {
            alpha_pattern: alphas
                .iter()
                .filter(|(_, other)| *other != alpha)
                .map(|(path, alpha)| (only(path), Number(*alpha)))
                .collect(),
            base_model_name_or_path: adapter.origin.base_model.clone(),
            bias: adapter.bias,
            exclude_modules,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            layers_pattern: None,
            layers_to_transform: None,
            lora_alpha: Number(alpha),
            lora_bias: layers.values().any(|layer| layer.bias.is_some()),
            lora_dropout: adapter.dropout,
            modules_to_save: Some(adapter.modules_to_save.clone())
                .filter(|names| !names.is_empty()),
            peft_type: "LORA",
            r: rank,
            rank_pattern: layers
                .iter()
                .filter(|(_, layer)| layer.rank() != rank)
                .map(|(path, layer)| (only(path), layer.rank()))
                .collect(),
            revision: adapter.origin.revision.clone(),
            target_modules,
            task_type: adapter.origin.task_type.clone(),
            use_dora: false,
            use_rslora: rslora,
        }
    }

    /// The file's text.
    pub fn text(&self) -> Result<String, String> {
        let text = serde_json::to_string_pretty(self).map_err(|error| error.to_string())?;
        Ok(text + "\n")
    }
}

/// The last segment of a path.
pub(super) fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The value that occurs most often; of several, the smallest.
pub(super) fn commonest<T: Ord + Hash + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = HashMap::new();
    for value in values {
        *counts.entry(value).or_insert(0) += 1;
    }
    counts
        .into_iter()
        .max_by(|(a, n), (b, m)| n.cmp(m).then(b.cmp(a)))
        .map(|(value, _)| value)
}
