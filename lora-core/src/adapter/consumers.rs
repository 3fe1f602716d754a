//! How others read an adapter folder, and whether that is what was meant.
//!
//! Each checker follows the rules of one reader and says what that reader would use. It shares no
//! code with our own reader, so that a mistake there shows.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde_json::Value;

use super::{
    LayerWeights,
    folder::{CONFIG, WEIGHTS},
    universal::scaled_b,
};
use crate::{Error, Result};

/// A program that reads adapter folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consumer {
    /// Hugging Face PEFT.
    Peft,
    /// vLLM.
    Vllm,
    /// llama.cpp's `convert_lora_to_gguf.py`.
    LlamaCpp,
    /// mistral.rs.
    MistralRs,
    /// NeMo AutoModel.
    Nemo,
}

type Layers = BTreeMap<String, LayerWeights>;
type Problems = Vec<String>;

impl Consumer {
    /// All that are known.
    pub const ALL: [Self; 5] = [
        Self::Peft,
        Self::Vllm,
        Self::LlamaCpp,
        Self::MistralRs,
        Self::Nemo,
    ];

    /// What this program would use of a folder: the tensors and the scaling of each layer.
    ///
    /// # Errors
    /// An [`Error::Checkpoint`] that says why it would refuse the folder.
    pub fn read(self, dir: impl AsRef<Path>) -> Result<BTreeMap<String, LayerWeights>> {
        let dir = dir.as_ref();
        self.layers(&dir.join(CONFIG), &dir.join(WEIGHTS))
            .map_err(|problems| Error::Checkpoint {
                file: dir.to_path_buf(),
                problems,
            })
    }

    /// Checks that this program would compute with the files what was meant.
    pub(super) fn check(
        self,
        config: &Path,
        weights: &Path,
        meant: &Layers,
    ) -> Result<(), Problems> {
        let used = self.layers(config, weights)?;
        let mut problems = Vec::new();
        for path in meant.keys().filter(|path| !used.contains_key(*path)) {
            problems.push(format!("{self} would leave out `{path}`"));
        }
        for (path, used) in &used {
            let same = match meant.get(path) {
                Some(meant) => is_same(used, meant).unwrap_or(false),
                None => false,
            };
            if !same {
                problems.push(format!("{self} would use `{path}` otherwise than meant"));
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }

    fn layers(self, config: &Path, weights: &Path) -> Result<Layers, Problems> {
        let one = |error: &dyn fmt::Display| vec![format!("{self}: {error}")];
        let text = fs::read(config).map_err(|error| one(&error))?;
        let config: Value = serde_json::from_slice(&text).map_err(|error| one(&error))?;
        let tensors = candle_core::safetensors::load(weights, &Device::Cpu);
        let tensors = tensors.map_err(|error| one(&error))?.into_iter().collect();
        let files = Files { config, tensors };
        let mut problems = self.refusals(&files);
        let mut layers = Layers::new();
        for (path, factors) in files.factors(self, &mut problems) {
            match factors {
                (Some(a), Some(b), bias) => {
                    let rank = a.dims().first().copied().unwrap_or(0);
                    match self.scaling(&files, &path, rank) {
                        Ok(scaling) => {
                            layers.insert(
                                path,
                                LayerWeights {
                                    a,
                                    b,
                                    bias,
                                    alpha: scaling * rank as f64,
                                    rslora: false,
                                },
                            );
                        }
                        Err(problem) => problems.push(problem),
                    }
                }
                _ => problems.push(format!("`{path}` has only one of A and B")),
            }
        }
        if problems.is_empty() {
            return Ok(layers);
        }
        Err(problems
            .iter()
            .map(|problem| format!("{self}: {problem}"))
            .collect())
    }

    /// Why it would refuse the configuration.
    fn refusals(self, files: &Files) -> Problems {
        let required: &[&str] = match self {
            Self::Peft => &["peft_type", "target_modules"],
            Self::Vllm => &["r", "lora_alpha", "target_modules"],
            Self::LlamaCpp => &["lora_alpha"],
            Self::MistralRs | Self::Nemo => &["r", "lora_alpha"],
        };
        let mut problems: Problems = required
            .iter()
            .filter(|key| files.is_off(key))
            .map(|key| format!("{key} is missing"))
            .collect();
        let refused: &[&str] = match self {
            Self::Peft => &[],
            Self::Vllm => &["use_dora", "modules_to_save", "lora_bias"],
            // It would go on without them, and compute something else.
            Self::LlamaCpp => &["use_dora", "lora_bias"],
            Self::MistralRs => &[
                "use_dora",
                "modules_to_save",
                "lora_bias",
                "layer_replication",
            ],
            Self::Nemo => &["modules_to_save", "lora_bias", "rank_pattern"],
        };
        for key in refused.iter().filter(|key| !files.is_off(key)) {
            problems.push(format!("{key} = {} is not supported", files.config[key]));
        }
        let bias = files
            .config
            .get("bias")
            .and_then(Value::as_str)
            .unwrap_or("none");
        if self != Self::Peft && bias != "none" {
            problems.push(format!("bias = {bias} is not supported"));
        }
        problems
    }

    /// The scaling that it would give a layer.
    fn scaling(self, files: &Files, path: &str, rank: usize) -> Result<f64, String> {
        let number = |key: &str, default: f64| match files.config.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| format!("{key} is no number")),
        };
        let (r, alpha) = (number("r", 8.0)?, number("lora_alpha", 8.0)?);
        let rslora = files
            .config
            .get("use_rslora")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let divisor = |rank: f64| if rslora { rank.sqrt() } else { rank };
        match self {
            Self::Peft | Self::MistralRs => {
                let r = files.pattern("rank_pattern", path)?.unwrap_or(r);
                let alpha = files.pattern("alpha_pattern", path)?.unwrap_or(alpha);
                if r != rank as f64 {
                    return Err(format!(
                        "`{path}` has rank {rank}, by the configuration {r}"
                    ));
                }
                Ok(alpha / divisor(r))
            }
            Self::Vllm if rank as f64 > r => {
                Err(format!("`{path}` has rank {rank}, above r = {r}"))
            }
            Self::Vllm => Ok(alpha / divisor(r)),
            Self::LlamaCpp if alpha == 0.0 => Ok(1.0),
            Self::LlamaCpp => Ok(alpha / rank as f64),
            Self::Nemo => Ok(alpha / r),
        }
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "PEFT",
            Self::Vllm => "vLLM",
            Self::LlamaCpp => "llama.cpp",
            Self::MistralRs => "mistral.rs",
            Self::Nemo => "NeMo AutoModel",
        })
    }
}

struct Files {
    config: Value,
    tensors: BTreeMap<String, Tensor>,
}

/// `A`, `B` and the bias of a layer, as far as they are there.
type Factors = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl Files {
    /// Whether a field is absent or says nothing.
    fn is_off(&self, key: &str) -> bool {
        match self.config.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(values)) => values.is_empty(),
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(_) => false,
        }
    }

    /// The tensors by layer, as `consumer` takes their names.
    fn factors(&self, consumer: Consumer, problems: &mut Problems) -> BTreeMap<String, Factors> {
        let mut layers = BTreeMap::<String, Factors>::new();
        let targets = self.config.get("target_modules");
        let targets: Vec<&str> = targets
            .and_then(Value::as_array)
            .map(|targets| targets.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        for (name, tensor) in &self.tensors {
            let Some(key) = name.strip_prefix("base_model.model.") else {
                problems.push(format!("`{name}` lacks the prefix"));
                continue;
            };
            let split = |suffix| key.strip_suffix(suffix);
            let (path, part) = match (split(".lora_A.weight"), split(".lora_B.weight")) {
                (Some(path), _) => (path, 0),
                (_, Some(path)) => (path, 1),
                _ => match (consumer, split(".lora_B.bias")) {
                    (Consumer::Peft, Some(path)) if !self.is_off("lora_bias") => (path, 2),
                    (Consumer::Peft, _) if self.is_saved(key) => continue,
                    _ => {
                        problems.push(format!("`{name}` is no tensor of an adapter"));
                        continue;
                    }
                },
            };
            let leaf = path.rsplit_once('.').map_or(path, |(_, leaf)| leaf);
            let called = |target: &&str| match consumer {
                Consumer::Vllm => target.rsplit_once('.').map_or(*target, |(_, leaf)| leaf) == leaf,
                _ => path == *target || path.ends_with(&format!(".{target}")),
            };
            let by_targets = matches!(consumer, Consumer::Peft | Consumer::Vllm);
            if by_targets && !targets.iter().any(called) {
                problems.push(format!("target_modules doesn't call for `{path}`"));
            }
            let factors = layers.entry(path.to_string()).or_default();
            let slot = [&mut factors.0, &mut factors.1, &mut factors.2];
            if let Some(slot) = slot.into_iter().nth(part) {
                *slot = Some(tensor.clone());
            }
        }
        layers
    }

    /// Whether PEFT would put a whole tensor into the model.
    fn is_saved(&self, key: &str) -> bool {
        let bias = self
            .config
            .get("bias")
            .and_then(Value::as_str)
            .unwrap_or("none");
        let module = key.rsplit_once('.').map_or("", |(module, _)| module);
        // PEFT looks for modules whose names end like an entry, at a dot or not.
        let ends = || module.match_indices('.').map(|(end, _)| end);
        let saves = |entry: &Value| {
            let mut ends = ends().chain([module.len()]);
            entry
                .as_str()
                .is_some_and(|entry| ends.any(|end| module[..end].ends_with(entry)))
        };
        bias != "none" && key.ends_with(".bias")
            || self
                .config
                .get("modules_to_save")
                .and_then(Value::as_array)
                .is_some_and(|entries| entries.iter().any(saves))
    }

    /// A layer's value by pattern: the first that matches the end of its path.
    fn pattern(&self, field: &str, path: &str) -> Result<Option<f64>, String> {
        let Some(patterns) = self.config.get(field).and_then(Value::as_object) else {
            return Ok(None);
        };
        for (pattern, value) in patterns {
            let exact = pattern
                .strip_prefix('^')
                .and_then(|rest| rest.strip_suffix('$'));
            let matches = match exact {
                Some(exact) => regex::escape(path) == exact,
                None => regex::Regex::new(&format!(r"^(.*\.)?({pattern})$"))
                    .map_err(|error| format!("{field}: {error}"))?
                    .is_match(path),
            };
            if matches {
                return Ok(value.as_f64());
            }
        }
        Ok(None)
    }
}

/// Whether both compute the same: equal `A`, equal scaled `B`, and only zeros beyond the rank that
/// is meant.
fn is_same(used: &LayerWeights, meant: &LayerWeights) -> candle_core::Result<bool> {
    /// What one rounding to f32 leaves.
    const TOLERANCE: f64 = 1e-7;
    let f64s = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let close = |used: &Tensor, meant: &Tensor| -> candle_core::Result<bool> {
        if used.dims() != meant.dims() {
            return Ok(false);
        }
        let norm = |tensor: &Tensor| tensor.sqr()?.sum_all()?.to_scalar::<f64>();
        let error = norm(&(used - meant)?)?.sqrt();
        Ok(error <= TOLERANCE * norm(meant)?.sqrt())
    };
    let bias = match (&used.bias, &meant.bias) {
        (Some(used_bias), Some(meant_bias)) => close(
            &(f64s(used_bias)? * used.scaling())?,
            &(f64s(meant_bias)? * meant.scaling())?,
        )?,
        (Some(bias), None) => f64s(bias)?.abs()?.max_all()?.to_scalar::<f64>()? == 0.0,
        (None, bias) => bias.is_none(),
    };
    let rank = meant.rank();
    let Some(beyond) = used.rank().checked_sub(rank) else {
        return Ok(false);
    };
    let (a, b) = (f64s(&used.a)?, scaled_b(used)?);
    let zero = |tensor: &Tensor| -> candle_core::Result<bool> {
        Ok(tensor.elem_count() == 0 || tensor.abs()?.max_all()?.to_scalar::<f64>()? == 0.0)
    };
    Ok(bias
        && close(&a.narrow(0, 0, rank)?, &f64s(&meant.a)?)?
        && close(&b.narrow(1, 0, rank)?, &scaled_b(meant)?)?
        && zero(&a.narrow(0, rank, beyond)?)?
        && zero(&b.narrow(1, rank, beyond)?)?)
}
