//! Configuration of a Llama-family model: Hugging Face's `config.json`.

use serde_json::Map;
use serde_json::Value;

use crate::Error;
use crate::Result;

/// The model families that share one decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, SmolLM2, TinyLlama.
    Llama,
    /// Mistral 7B.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
}

impl Architecture {
    const ALL: [(Self, &str, &str); 3] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Mistral, "MistralForCausalLM", "mistral"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
    ];

    /// The class name under `architectures`.
    pub fn class_name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// The `model_type`.
    pub fn model_type(self) -> &'static str {
        Self::ALL[self as usize].2
    }

    fn from_json(json: &Map<String, Value>) -> Result<Self> {
        let class = json
            .get("architectures")
            .and_then(|a| a.get(0))
            .and_then(Value::as_str);
        let model_type = json.get("model_type").and_then(Value::as_str);
        Self::ALL
            .iter()
            .find(|(_, c, m)| class.map_or(model_type == Some(m), |class| class == *c))
            .map(|(architecture, ..)| *architecture)
            .ok_or_else(|| Error::Architecture {
                found: class.or(model_type).unwrap_or("(none named)").to_string(),
            })
    }
}

/// How rotary frequencies are stretched beyond the context a model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor of all frequencies.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length before the stretch, in tokens.
        original_context: f64,
    },
}

/// Which attention projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// None of them (Llama, Mistral).
    None,
    /// q, k and v (Qwen2).
    Qkv,
    /// All four (Llama with `attention_bias`).
    All,
}

/// Shapes and constants of a Llama-family model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretch of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model is exact for, in tokens (Mistral: at most its sliding window).
    pub max_length: usize,
    /// Biases of the attention projections.
    pub attention_bias: AttentionBias,
    /// Whether gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Whether the head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The file as read, so that saving keeps what this struct does not model.
    json: Map<String, Value>,
}

impl Config {
    /// Reads the fields of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Architecture`] for an unknown family, [`Error::Config`] naming the field for
    /// anything missing, mistyped or unsupported.
    pub fn from_json(json: Map<String, Value>) -> Result<Self> {
        let architecture = Architecture::from_json(&json)?;
        let fields = Fields(&json);
        fields.expect_silu()?;
        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let num_key_value_heads = fields.size_or("num_key_value_heads", num_attention_heads)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(Error::config(
                "num_key_value_heads",
                format!(
                    "is {num_key_value_heads}, which does not divide {num_attention_heads} heads"
                ),
            ));
        }
        let head_dim = fields.size_or("head_dim", hidden_size / num_attention_heads)?;
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::config(
                "head_dim",
                format!("is {head_dim}; RoPE needs an even width"),
            ));
        }
        let (rope_theta, rope_scaling) = fields.rope()?;
        Ok(Self {
            architecture,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers: fields.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.number_or(&json, "rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            max_length: fields.max_length(architecture)?,
            attention_bias: match architecture {
                Architecture::Qwen2 => AttentionBias::Qkv,
                _ if fields.flag("attention_bias")? => AttentionBias::All,
                _ => AttentionBias::None,
            },
            mlp_bias: fields.flag("mlp_bias")?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            eos_token_ids: token_ids(json.get("eos_token_id")),
            json,
        })
    }

    /// The `config.json` this was read from, with `tie_word_embeddings` and the dtype as given.
    pub fn to_json(&self, tie_word_embeddings: bool, dtype: &str) -> Map<String, Value> {
        let mut json = self.json.clone();
        json.insert("tie_word_embeddings".into(), tie_word_embeddings.into());
        json.remove("torch_dtype");
        json.insert("dtype".into(), dtype.into());
        json
    }

    /// Rotary frequencies, radians a token. `[head_dim / 2]`
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let plain = (0..self.head_dim / 2)
            .map(|i| self.rope_theta.powf(-2. * i as f64 / self.head_dim as f64));
        match self.rope_scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => plain
                .map(|f| {
                    let turns = original_context * f / (2. * std::f64::consts::PI);
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0., 1.);
                    keep * f + (1. - keep) * f / factor
                })
                .collect(),
        }
    }
}

/// Token ids under a field that holds one id or a list.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let ids = match value {
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
        None => &[],
    };
    ids.iter()
        .filter_map(|id| u32::try_from(id.as_u64()?).ok())
        .collect()
}

/// Typed access to the fields of a `config.json`; `null` counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn value(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &str) -> Result<usize> {
        self.value(field)
            .ok_or_else(|| Error::config(field, "is missing"))?
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n > 0)
            .ok_or_else(|| Error::config(field, "is not a positive whole number"))
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        if self.value(field).is_some() {
            self.size(field)
        } else {
            Ok(default)
        }
    }

    fn flag(&self, field: &str) -> Result<bool> {
        self.value(field).map_or(Ok(false), |value| {
            value
                .as_bool()
                .ok_or_else(|| Error::config(field, "is neither true nor false"))
        })
    }

    /// A positive number of `object`, which is the file or an object in it.
    fn number_or(&self, object: &Map<String, Value>, field: &str, default: f64) -> Result<f64> {
        object
            .get(field)
            .filter(|value| !value.is_null())
            .map_or(Ok(default), |value| {
                value
                    .as_f64()
                    .filter(|x| *x > 0.)
                    .ok_or_else(|| Error::config(field, "is not a positive number"))
            })
    }

    fn expect_silu(&self) -> Result<()> {
        match self.value("hidden_act") {
            None => Ok(()),
            Some(act) if act == "silu" => Ok(()),
            Some(act) => Err(Error::config(
                "hidden_act",
                format!("is {act}; only \"silu\" is supported"),
            )),
        }
    }

    /// Theta and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`, which
    /// holds both since transformers 5.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let field = if self.value("rope_parameters").is_some() {
            "rope_parameters"
        } else {
            "rope_scaling"
        };
        let empty = Map::new();
        let rope = match self.value(field) {
            None => &empty,
            Some(value) => value
                .as_object()
                .ok_or_else(|| Error::config(field, "is not an object"))?,
        };
        let theta = self.number_or(self.0, "rope_theta", 10_000.)?;
        let theta = self.number_or(rope, "rope_theta", theta)?;
        let need = |name: &str| match self.number_or(rope, name, 0.)? {
            0. => Err(Error::config(format!("{field}.{name}"), "is missing")),
            x => Ok(x),
        };
        let kind = rope
            .get("rope_type")
            .or(rope.get("type"))
            .and_then(Value::as_str);
        let scaling = match kind.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: need("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")?,
            },
            other => {
                return Err(Error::config(
                    field,
                    format!("is of kind `{other}`; supported are default, linear and llama3"),
                ));
            }
        };
        Ok((theta, scaling))
    }

    fn max_length(&self, architecture: Architecture) -> Result<usize> {
        let context = self.size("max_position_embeddings")?;
        // Attention within the window is plain causal attention; beyond it, it would differ.
        let windowed = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => true,
            Architecture::Qwen2 => self.flag("use_sliding_window")?,
        };
        let window = if windowed {
            self.size_or("sliding_window", context)?
        } else {
            context
        };
        Ok(context.min(window))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(changes: Value) -> Result<Config> {
        let mut json = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 40,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": [2, 0],
        });
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        Config::from_json(json.as_object().unwrap().clone())
    }

    #[test]
    fn absent_fields_take_the_defaults_of_the_family() {
        let llama = parse(json!({})).unwrap();
        assert_eq!((llama.head_dim, llama.num_key_value_heads), (4, 3));
        assert_eq!(llama.attention_bias, AttentionBias::None);
        assert_eq!(llama.eos_token_ids, [2, 0]);
        let qwen =
            parse(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8})).unwrap();
        assert_eq!(
            (qwen.attention_bias, qwen.max_length),
            (AttentionBias::Qkv, 64)
        );
        let mistral = parse(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8}));
        assert_eq!(mistral.unwrap().max_length, 8);
    }

    #[test]
    fn errors_name_the_field() {
        for (changes, message) in [
            (
                json!({"architectures": ["GPT2LMHeadModel"]}),
                "architecture `GPT2LMHeadModel` is not",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
                "`rope_scaling` is of kind `yarn`",
            ),
            (
                json!({"rope_scaling": {"type": "linear"}}),
                "`rope_scaling.factor` is missing",
            ),
            (
                json!({"hidden_size": "wide"}),
                "`hidden_size` is not a positive whole number",
            ),
            (json!({"hidden_size": null}), "`hidden_size` is missing"),
            (json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\""),
            (
                json!({"num_key_value_heads": 2}),
                "`num_key_value_heads` is 2, which does not divide 3",
            ),
            (json!({"head_dim": 5}), "`head_dim` is 5"),
        ] {
            let error = parse(changes).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn rope_theta_is_read_from_either_place() {
        let old = parse(json!({"rope_theta": 5e5})).unwrap();
        let new = parse(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}));
        assert_eq!(old.rope_frequencies(), new.unwrap().rope_frequencies());
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaled = parse(json!({"head_dim": 64, "rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}))
        .unwrap();
        let plain = parse(json!({"head_dim": 64, "rope_theta": 5e5}))
            .unwrap()
            .rope_frequencies();
        let frequencies = scaled.rope_frequencies();
        assert_eq!(frequencies[0], plain[0]);
        assert_eq!(frequencies[31], plain[31] / 8.);
        // 1.2236 turns in 8192 tokens: on the ramp, 0.0745 kept and the rest divided
        let ratio = frequencies[17] / plain[17];
        assert!((ratio - 0.190211).abs() < 1e-6, "{ratio}");
    }
}
