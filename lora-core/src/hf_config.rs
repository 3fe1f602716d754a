//! `adapter_config.json`, the configuration that Hugging Face PEFT keeps beside an adapter.

use std::collections::{BTreeMap, HashMap};

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{LoraSite, config::integer_if_whole};

/// What is written: the fields that every reader since PEFT 0.6 knows, in the order of their names.
#[derive(Serialize)]
pub(crate) struct HfConfig {
    alpha_pattern: BTreeMap<String, Number>,
    base_model_name_or_path: Option<String>,
    bias: &'static str,
    /// Since PEFT 0.14, so written only where it is needed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    exclude_modules: Vec<String>,
    fan_in_fan_out: bool,
    inference_mode: bool,
    init_lora_weights: bool,
    layers_pattern: Option<()>,
    layers_to_transform: Option<()>,
    lora_alpha: Number,
    lora_dropout: f64,
    modules_to_save: Option<()>,
    peft_type: &'static str,
    r: usize,
    rank_pattern: BTreeMap<String, usize>,
    revision: Option<()>,
    target_modules: Vec<String>,
    task_type: Option<()>,
    use_dora: bool,
    use_rslora: bool,
}

#[derive(Clone, Copy, Serialize)]
#[serde(transparent)]
struct Number(#[serde(serialize_with = "integer_if_whole")] f64);

impl HfConfig {
    /// Describes adapters. The commonest rank and alpha are the default; a site with others gets
    /// a pattern of its own. `others` are the paths of the layers without an adapter: PEFT takes a
    /// target for the end of a path, so that those which end like an adapted one must be excluded.
    pub fn of(sites: &[LoraSite], others: &[String], dropout: f64) -> Self {
        let rank = commonest(sites.iter().map(|site| site.rank)).unwrap_or(1);
        let alpha =
            commonest(sites.iter().map(|site| site.alpha.to_bits())).map_or(1.0, f64::from_bits);
        let only = |site: &LoraSite| format!("^{}$", regex::escape(&site.path));
        let mut target_modules: Vec<_> = sites.iter().map(|site| site.path.clone()).collect();
        target_modules.sort();
        Self {
            alpha_pattern: sites
                .iter()
                .filter(|site| site.alpha != alpha)
                .map(|site| (only(site), Number(site.alpha)))
                .collect(),
            base_model_name_or_path: None,
            bias: "none",
            exclude_modules: others
                .iter()
                .filter(|other| sites.iter().any(|site| ends_with(other, &site.path)))
                .cloned()
                .collect(),
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            layers_pattern: None,
            layers_to_transform: None,
            lora_alpha: Number(alpha),
            lora_dropout: dropout,
            modules_to_save: None,
            peft_type: "LORA",
            r: rank,
            rank_pattern: sites
                .iter()
                .filter(|site| site.rank != rank)
                .map(|site| (only(site), site.rank))
                .collect(),
            revision: None,
            target_modules,
            task_type: None,
            use_dora: false,
            use_rslora: false,
        }
    }
}

/// The value that occurs most often; of several, the smallest.
fn commonest<T: Ord + std::hash::Hash + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = HashMap::new();
    for value in values {
        *counts.entry(value).or_insert(0) += 1;
    }
    counts
        .into_iter()
        .max_by(|(a, n), (b, m)| n.cmp(m).then(b.cmp(a)))
        .map(|(value, _)| value)
}

/// What is read: the fields that say how the tensors act.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub(crate) struct HfSettings {
    r: usize,
    lora_alpha: f64,
    pub lora_dropout: f64,
    use_rslora: bool,
    rank_pattern: BTreeMap<String, usize>,
    alpha_pattern: BTreeMap<String, f64>,
    target_modules: Value,
    exclude_modules: Value,
    layers_to_transform: Value,
}

impl Default for HfSettings {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            target_modules: Value::Null,
            exclude_modules: Value::Null,
            layers_to_transform: Value::Null,
        }
    }
}

impl HfSettings {
    /// Fields of [`HfSettings`].
    const UNDERSTOOD: [&str; 9] = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ];

    /// Fields that say where an adapter came from, not what it does.
    const PROVENANCE: [&str; 11] = [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ];

    /// Reads a configuration; a setting that would be lost is an error that names it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        for (key, value) in &fields {
            let supported = match key.as_str() {
                "peft_type" => value == "LORA",
                "bias" => value == "none",
                // The strings name rules that change the base as well.
                "init_lora_weights" => !value.is_string() || value == "gaussian",
                key if Self::UNDERSTOOD.contains(&key) || Self::PROVENANCE.contains(&key) => true,
                _ => is_off(value),
            };
            if !supported {
                return Err(format!("{key} = {value} is not supported"));
            }
        }
        if !fields.contains_key("peft_type") {
            return Err("peft_type is missing; it must be \"LORA\"".to_string());
        }
        let understood = fields
            .into_iter()
            .filter(|(key, value)| Self::UNDERSTOOD.contains(&key.as_str()) && !value.is_null());
        serde_json::from_value(Value::Object(understood.collect()))
            .map_err(|error| error.to_string())
    }

    /// The rank that the tensors at `path` must have.
    pub fn rank(&self, path: &str) -> Result<usize, String> {
        Ok(lookup(&self.rank_pattern, path)?.unwrap_or(self.r))
    }

    /// Alpha for the adapter at `path`, such that `alpha / rank` is its scaling.
    pub fn alpha(&self, path: &str, rank: usize) -> Result<f64, String> {
        let alpha = lookup(&self.alpha_pattern, path)?.unwrap_or(self.lora_alpha);
        // rsLoRA scales by alpha / √rank (Kalajdzievski 2023).
        Ok(if self.use_rslora {
            alpha * (rank as f64).sqrt()
        } else {
            alpha
        })
    }

    /// Whether `target_modules`, being a list of names and the only rule, calls for an adapter at
    /// `path`. Other rules are not applied: the tensors say what is adapted.
    pub fn calls_for(&self, path: &str) -> bool {
        let (Value::Array(names), Value::Null, Value::Null) = (
            &self.target_modules,
            &self.exclude_modules,
            &self.layers_to_transform,
        ) else {
            return false;
        };
        names
            .iter()
            .filter_map(Value::as_str)
            .any(|name| ends_with(path, name))
    }
}

/// Whether `name` is `path`, or its end from a dot: PEFT's rule for `target_modules`.
fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|parent| parent.is_empty() || parent.ends_with('.'))
}

/// Whether a setting that we don't know is at rest.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// The value of the first pattern that matches the end of `path`, from a dot or the start: PEFT's
/// rule for `rank_pattern` and `alpha_pattern`.
fn lookup<T: Copy>(patterns: &BTreeMap<String, T>, path: &str) -> Result<Option<T>, String> {
    for (pattern, value) in patterns {
        let regex = Regex::new(&format!(r"^(.*\.)?({pattern})$"))
            .map_err(|error| format!("pattern `{pattern}`: {error}"))?;
        if regex.is_match(path) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
