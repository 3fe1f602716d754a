//! `adapter_config.json`: how an adapter's tensors act.
//!
//! Every field that PEFT has is understood or refused by name; a field that we don't know must be
//! at rest.

use super::{
    Origin,
    json::{Fields, Json},
    pattern::Patterns,
};
use crate::{BiasMode, DropoutPosition};

/// What an adapter's configuration says of its tensors.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// `None`: absent, which means 8.
    pub rank: Option<usize>,
    pub alpha: f64,
    pub dropout: f64,
    pub dropout_position: DropoutPosition,
    pub rslora: bool,
    pub rank_pattern: Patterns<usize>,
    pub alpha_pattern: Patterns<f64>,
    pub lora_bias: bool,
    pub bias: BiasMode,
    pub modules_to_save: Vec<String>,
    /// `target_modules`, if it is a list.
    pub targets: Option<Vec<String>>,
    pub excluded: Vec<String>,
    pub origin: Origin,
    pub notes: Vec<String>,
}

impl Default for Settings {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            rank: None,
            alpha: 8.0,
            dropout: 0.0,
            dropout_position: DropoutPosition::Pre,
            rslora: false,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            lora_bias: false,
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
            targets: None,
            excluded: Vec::new(),
            origin: Origin::default(),
            notes: Vec::new(),
        }
    }
}

/// PEFT's default rank.
pub(super) const DEFAULT_RANK: usize = 8;

/// Fields that are refused unless they are at rest, and what they mean.
const REFUSED: [(&str, &str); 14] = [
    (
        "alora_invocation_tokens",
        "adapters that act from some token on",
    ),
    ("arrow_config", "routed adapters"),
    ("ensure_weight_tying", "adapters of tied weights"),
    (
        "fan_in_fan_out",
        "base layers that store their weight transposed",
    ),
    ("kasa_config", "an init that changes the base as well"),
    ("layer_replication", "a base whose layers are repeated"),
    ("megatron_config", "parallel layers of Megatron"),
    ("monteclora_config", "sampled adapters"),
    (
        "target_parameters",
        "adapters of bare parameters, such as stacked experts",
    ),
    ("trainable_token_indices", "trained rows of an embedding"),
    ("use_bdlora", "block-diagonal matrices"),
    ("use_dora", "DoRA, which scales the rows of the base weight"),
    ("use_qalora", "adapters of grouped inputs"),
    ("velora_config", "compressed gradients"),
];

/// Fields that say how an adapter was made or comes to be, not what it does.
const IGNORED: [&str; 14] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "peft_type",
];

const TASKS: [&str; 6] = [
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
];

impl Settings {
    /// Reads `adapter_config.json`, or says all that is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, Vec<String>> {
        let fields = Json::object(bytes).map_err(|problem| vec![problem])?;
        let (mut settings, mut problems) = (Self::default(), Vec::new());
        for (key, value) in &fields {
            if let Err(problem) = settings.set(key, value) {
                problems.push(format!("{key}: {problem}"));
            }
        }
        problems.extend(peft_type(&fields).err());
        if problems.is_empty() {
            Ok(settings)
        } else {
            Err(problems)
        }
    }

    fn set(&mut self, key: &str, value: &Json) -> Result<(), String> {
        match key {
            "init_lora_weights" => return init(value),
            // The fields that are absent or null have their defaults.
            _ if *value == Json::Null => {}
            "r" => self.rank = Some(value.as_count()?),
            "lora_alpha" => self.alpha = value.as_float()?,
            "lora_dropout" => self.dropout = probability(value)?,
            "use_rslora" => self.rslora = value.as_bool()?,
            "rank_pattern" => {
                for (pattern, rank) in value.as_object()? {
                    self.rank_pattern.push(pattern, rank.as_count()?)?;
                }
            }
            "alpha_pattern" => {
                for (pattern, alpha) in value.as_object()? {
                    self.alpha_pattern.push(pattern, alpha.as_float()?)?;
                }
            }
            "lora_bias" => self.lora_bias = value.as_bool()?,
            "bias" => {
                self.bias = match value.as_text()? {
                    "none" => BiasMode::None,
                    "all" => BiasMode::All,
                    "lora_only" => BiasMode::LoraOnly,
                    _ => return Err(format!("{value} is none of none, all, lora_only")),
                }
            }
            "modules_to_save" => self.modules_to_save = value.as_texts()?,
            // A text is a regular expression over the model's layers. The tensors say what it hit.
            "target_modules" if matches!(value, Json::Text(_)) => {}
            "target_modules" => self.targets = Some(value.as_texts()?),
            "exclude_modules" if matches!(value, Json::Text(_)) => {
                let note =
                    format!("exclude_modules = {value} was applied when the adapter was made");
                self.notes.push(note);
            }
            "exclude_modules" => self.excluded = value.as_texts()?,
            "base_model_name_or_path" => self.origin.base_model = Some(value.as_text()?.into()),
            "revision" => self.origin.revision = Some(value.as_text()?.into()),
            "task_type" if TASKS.contains(&value.as_text()?) => {
                self.origin.task_type = Some(value.as_text()?.into());
            }
            "task_type" => return Err(format!("{value} is none of {}", TASKS.join(", "))),
            _ if IGNORED.contains(&key) => {}
            _ if value.is_resting() => {}
            _ => {
                let known = REFUSED.iter().find(|(name, _)| *name == key);
                return Err(match known {
                    Some((_, meaning)) => format!("{value} is not supported: {meaning}"),
                    None => format!("{value} is not supported: the field is unknown"),
                });
            }
        }
        Ok(())
    }

    /// Reads NeMo AutoModel's `automodel_peft_config.json`, which has what the other file lacks.
    pub fn add_automodel(&mut self, bytes: &[u8]) -> Result<(), Vec<String>> {
        /// Fields that say which layers were adapted and how fast, not what the adapter does.
        const IGNORED: [&str; 12] = [
            "target_modules",
            "exclude_modules",
            "match_all_linear",
            "lora_A_init",
            "lora_dtype",
            "use_triton",
            "use_fused",
            "use_memory_efficient_lora",
            "seed",
            "dim",
            "alpha",
            "quantization_config",
        ];
        let fields = Json::object(bytes).map_err(|problem| vec![problem])?;
        let mut problems = Vec::new();
        for (key, value) in &fields {
            let set = match key.as_str() {
                "dropout" => probability(value).map(|dropout| self.dropout = dropout),
                "dropout_position" => match value {
                    Json::Text(position) if position == "pre" => {
                        self.dropout_position = DropoutPosition::Pre;
                        Ok(())
                    }
                    Json::Text(position) if position == "post" => {
                        self.dropout_position = DropoutPosition::Post;
                        Ok(())
                    }
                    other => Err(format!("{other} is neither pre nor post")),
                },
                "expert_weight_format" => Ok(()),
                key if IGNORED.contains(&key) || value.is_resting() => Ok(()),
                "moe_rank_scaling" => Err(format!("{value} is not supported: adapters of experts")),
                "use_dora" => Err(format!("{value} is not supported: DoRA")),
                _ => Err(format!("{value} is not supported: the field is unknown")),
            };
            problems.extend(set.err().map(|problem| format!("{key}: {problem}")));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(problems)
        }
    }

    /// The rank that the configuration gives the layer at `path`, and where it says so.
    pub fn rank_of(&self, path: &str) -> Result<(usize, String), String> {
        let found = self
            .rank_pattern
            .find(path)
            .map_err(|problem| format!("rank_pattern: {problem}"))?;
        Ok(match (found, self.rank) {
            (Some((pattern, rank)), _) => (rank, format!("rank_pattern `{pattern}`")),
            (None, Some(rank)) => (rank, "r".into()),
            (None, None) => (DEFAULT_RANK, "r being absent".into()),
        })
    }

    /// The alpha of the layer at `path`.
    pub fn alpha_of(&self, path: &str) -> Result<f64, String> {
        let found = self.alpha_pattern.find(path);
        let found = found.map_err(|problem| format!("alpha_pattern: {problem}"))?;
        Ok(found.map_or(self.alpha, |(_, alpha)| alpha))
    }
}

fn peft_type(fields: &Fields) -> Result<(), String> {
    match fields.iter().find(|(key, _)| key == "peft_type") {
        Some((_, Json::Text(kind))) if kind == "LORA" => Ok(()),
        Some((_, other)) => Err(format!(
            "peft_type: {other} is not supported; it must be \"LORA\""
        )),
        None => Err("peft_type is missing; it must be \"LORA\"".into()),
    }
}

/// The ways to begin that leave the base as it is: afterwards they make no difference.
fn init(value: &Json) -> Result<(), String> {
    let Json::Text(name) = value else {
        return match value {
            Json::Null | Json::Bool(_) => Ok(()),
            other => Err(format!("{other} is neither a name nor true or false")),
        };
    };
    let mutating = ["pissa", "olora", "corda", "loftq", "lora_ga"];
    match name.as_str() {
        "gaussian" | "eva" | "orthogonal" => Ok(()),
        name if mutating.iter().any(|init| name.starts_with(init)) => Err(format!(
            "{value} changed the base weights as well; save the adapter in PEFT with \
             path_initial_model_for_weight_conversion, which makes it a plain one"
        )),
        _ => Err(format!("{value} is not supported")),
    }
}

fn probability(value: &Json) -> Result<f64, String> {
    let probability = value.as_float()?;
    if (0.0..=1.0).contains(&probability) {
        Ok(probability)
    } else {
        Err(format!("{value} is no probability"))
    }
}
