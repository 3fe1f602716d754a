//! What to adapt and how: NeMo AutoModel's `PeftConfig`, with PEFT's settings for single layers.

mod adapter;
mod fields;

use candle_core::DType;
use serde::{Deserialize, Serialize, Serializer, ser::Error as _};
use serde_json::{Map, Value};

pub use self::adapter::AdapterConfig;
pub(crate) use self::{
    adapter::scaling,
    fields::{Fields, integer_if_whole},
};
use self::{
    adapter::{check_alpha, check_rank},
    fields::Targets,
};
use crate::{DropoutPosition, Error, LoraInit, Result};

/// Which biases of the base are trained and saved with an adapter, by PEFT's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasMode {
    /// `none` of them.
    #[default]
    None,
    /// `all` of them.
    All,
    /// `lora_only`: those of the adapted layers.
    LoraOnly,
}

/// Which linear layers get an adapter, and what kind of adapter.
///
/// The fields are those of NeMo AutoModel's `PeftConfig`, with its names and meaning, and a
/// [`seed`](Self::seed). `use_triton` is called [`use_fused`](Self::use_fused) here and is read
/// under both names; it is on by default. Below them are the fields of Hugging Face PEFT's
/// `LoraConfig` that NeMo's lacks.
///
/// | field | default | meaning |
/// |---|---|---|
/// | `target_modules` | `[]` | patterns of the layers to adapt; `"all-linear"` sets `match_all_linear` |
/// | `exclude_modules` | `[]` | patterns of layers to leave alone; they win over every other rule |
/// | `match_all_linear` | `false` | every linear layer but the output head; excludes `target_modules` |
/// | `dim` | 8 | the rank r |
/// | `alpha` | 32 | the adapter's output is scaled by `alpha / dim` |
/// | `dropout` | 0 | probability, 0 ≤ p < 1; in training only |
/// | `dropout_position` | `post` | on the adapter's output, or `pre`: on its input |
/// | `lora_A_init` | `xavier` | see [`LoraInit`]; read as `init_lora_weights` too |
/// | `lora_dtype` | `None` | of the adapter; `None`: f64 over an f64 base, else f32 |
/// | `use_fused` | `true` | forward and backward as one operation each, or composed of candle's |
/// | `seed` | 0 | of the initialisation and of dropout |
/// | `use_rslora` | `false` | scale by `alpha / √dim` instead |
/// | `rank_pattern` | `{}` | the rank of single layers, by name |
/// | `alpha_pattern` | `{}` | the alpha of single layers, by name |
/// | `layers_to_transform` | `[]` | adapt only in the layers of these indices; `[]`: in all |
/// | `layers_pattern` | `[]` | the names of the lists that the indices are of; `[]`: the outermost |
/// | `modules_to_save` | `[]` | names of modules that are trained whole and saved with the adapters |
/// | `bias` | `none` | the biases of the base to train: `none`, `all`, `lora_only` (see [`BiasMode`]) |
/// | `lora_bias` | `false` | gives `lora_B` a bias; not with `lora_A_init` `gaussian`, `orthogonal` |
///
/// With `exclude_modules` alone, every linear layer but the head and the excluded is adapted. A
/// configuration that names nothing is an error. So is every entry, of any field, that does
/// nothing in the model: the error offers the names that come nearest. Where one value or a list
/// is meant, both are read, and `null` for none.
///
/// # Names
/// - A pattern of `target_modules` and `exclude_modules` is a [`Glob`](crate::Glob), or after
///   `re:` a regular expression that must cover the whole path.
/// - A key of `rank_pattern` and `alpha_pattern` is a regular expression for the end of the path,
///   from a dot or the start: `v_proj`, `layers.1.mlp.*`, `^lm_head`. Keys of one map that match
///   the same layer must agree: PEFT takes the first, and sorts them when it saves.
/// - The index of a layer is the outermost number of its path that follows a name: in
///   `layers.1.experts.7.up_proj` it is 1. With `layers_pattern` it is that which follows the
///   first of these names that the path has. A target that is the whole path of a layer holds
///   whatever its index; layers without an index are not adapted otherwise.
/// - A name in `modules_to_save` is the path of a module, or its end from a dot; nothing in such a
///   module is adapted, be it a target or not.
///
/// The setters take any value; what no adapter can have (rank 0, dropout 1) is an error that
/// names the field wherever the configuration is used, read or written.
///
/// ```
/// use lora_core::{LoraTargets, PeftConfig, nn::Linear, targets};
///
/// #[derive(LoraTargets)]
/// struct Attention { q_proj: Linear, v_proj: Linear }
///
/// let config = PeftConfig::new(targets!(Attention: ["q_proj", "v_proj"])).dim(16).alpha(24.0);
/// assert_eq!(config.scaling(), 1.5);
/// assert_eq!(PeftConfig::from_dict(&config.to_dict()?)?, config);
///
/// let error = PeftConfig::new(["q_proj"]).dropout(1.0).to_dict().unwrap_err();
/// assert!(error.to_string().starts_with("PeftConfig.dropout: "));
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Fields")]
pub struct PeftConfig {
    pub(crate) fields: Fields,
}

impl PeftConfig {
    /// Adapts the layers that any of `target_modules` names.
    pub fn new(target_modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            fields: Fields {
                target_modules: Targets::Patterns(strings(target_modules)),
                ..Fields::default()
            },
        }
    }

    /// Adapts every linear layer but the output head.
    pub fn all_linear() -> Self {
        Self {
            fields: Fields {
                match_all_linear: true,
                ..Fields::default()
            },
        }
    }

    /// Leaves alone the layers that any of `patterns` names.
    pub fn exclude(mut self, patterns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.fields.exclude_modules = strings(patterns);
        self
    }

    /// Sets the rank.
    pub fn dim(mut self, dim: usize) -> Self {
        self.fields.dim = dim;
        self
    }

    /// Sets alpha.
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.fields.alpha = alpha;
        self
    }

    /// Sets the probability of dropout.
    pub fn dropout(mut self, probability: f64) -> Self {
        self.fields.dropout = probability;
        self
    }

    /// Sets the side of the adapter that dropout applies to.
    pub fn dropout_position(mut self, position: DropoutPosition) -> Self {
        self.fields.dropout_position = position;
        self
    }

    /// Sets the initialisation of `lora_A`.
    pub fn lora_a_init(mut self, init: LoraInit) -> Self {
        self.fields.lora_a_init = init;
        self
    }

    /// Sets the type of the adapter's numbers.
    pub fn lora_dtype(mut self, dtype: DType) -> Self {
        self.fields.lora_dtype = Some(dtype);
        self
    }

    /// Chooses between the fused operation and candle's composition.
    pub fn use_fused(mut self, fused: bool) -> Self {
        self.fields.use_fused = fused;
        self
    }

    /// Sets the seed of the initialisation and of dropout.
    pub fn seed(mut self, seed: u64) -> Self {
        self.fields.seed = seed;
        self
    }

    /// Scales by `alpha / √rank` and not by `alpha / rank`.
    pub fn use_rslora(mut self, rslora: bool) -> Self {
        self.fields.use_rslora = rslora;
        self
    }

    /// Gives the layers whose path ends with a match of the regular expression the rank beside it.
    pub fn rank_pattern(
        mut self,
        ranks: impl IntoIterator<Item = (impl Into<String>, usize)>,
    ) -> Self {
        let entries = ranks.into_iter().map(|(key, rank)| (key.into(), rank));
        self.fields.rank_pattern = entries.collect();
        self
    }

    /// Gives the layers whose path ends with a match of the regular expression the alpha beside it.
    pub fn alpha_pattern(
        mut self,
        alphas: impl IntoIterator<Item = (impl Into<String>, f64)>,
    ) -> Self {
        let entries = alphas.into_iter().map(|(key, alpha)| (key.into(), alpha));
        self.fields.alpha_pattern = entries.collect();
        self
    }

    /// Adapts only in the layers of these indices.
    pub fn layers_to_transform(mut self, indices: impl IntoIterator<Item = usize>) -> Self {
        self.fields.layers_to_transform = indices.into_iter().collect();
        self
    }

    /// Names the lists of layers that the indices are of, such as `layers`.
    pub fn layers_pattern(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.fields.layers_pattern = strings(names);
        self
    }

    /// Names the modules that are trained whole and saved with the adapters.
    pub fn modules_to_save(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.fields.modules_to_save = strings(names);
        self
    }

    /// Chooses the biases of the base that are trained with the adapters.
    pub fn bias(mut self, bias: BiasMode) -> Self {
        self.fields.bias = bias;
        self
    }

    /// Gives every adapter a bias `[out]` of its own, which is scaled with it.
    pub fn lora_bias(mut self, lora_bias: bool) -> Self {
        self.fields.lora_bias = lora_bias;
        self
    }

    /// The patterns of the layers to adapt.
    pub fn target_modules(&self) -> &[String] {
        self.fields.target_modules.patterns()
    }

    /// The patterns of the layers to leave alone.
    pub fn exclude_modules(&self) -> &[String] {
        &self.fields.exclude_modules
    }

    /// Whether every linear layer but the head is adapted, be it asked for or for want of targets.
    pub fn match_all_linear(&self) -> bool {
        self.fields.match_all_linear
            || self.target_modules().is_empty() && !self.fields.exclude_modules.is_empty()
    }

    /// What an adapter of the default rank and alpha is scaled by: `alpha / dim`, or with rsLoRA
    /// `alpha / √dim`.
    pub fn scaling(&self) -> f64 {
        scaling(self.fields.alpha, self.fields.dim, self.fields.use_rslora)
    }

    /// What an adapter looks like, where no pattern says otherwise.
    ///
    /// # Errors
    /// An [`Error::Config`] for a value that no adapter can have.
    pub fn adapter(&self) -> Result<AdapterConfig> {
        let fields = &self.fields;
        AdapterConfig {
            dim: fields.dim,
            alpha: fields.alpha,
            dropout: fields.dropout,
            dropout_position: fields.dropout_position,
            lora_a_init: fields.lora_a_init,
            lora_dtype: fields.lora_dtype,
            use_fused: fields.use_fused,
            seed: fields.seed,
            rslora: fields.use_rslora,
            lora_bias: fields.lora_bias,
        }
        .checked()
    }

    /// Checks every field.
    ///
    /// # Errors
    /// An [`Error::Config`] that names the first field with an impossible value.
    pub fn validate(&self) -> Result<()> {
        let fields = &self.fields;
        if fields.match_all_linear && !self.target_modules().is_empty() {
            return Err(config(
                "match_all_linear",
                "excludes target_modules: give either one or the other",
            ));
        }
        if !self.match_all_linear() && self.target_modules().is_empty() {
            return Err(config(
                "target_modules",
                "names nothing: give patterns such as \"*.q_proj\", or set match_all_linear",
            ));
        }
        if fields.layers_to_transform.is_empty() && !fields.layers_pattern.is_empty() {
            return Err(config(
                "layers_pattern",
                "says which list layers_to_transform counts in: give the indices there, or leave \
                 it out",
            ));
        }
        let expression = |pattern: &&String| pattern.starts_with("re:");
        if let Some(target) = self.target_modules().iter().find(expression)
            && !fields.layers_to_transform.is_empty()
        {
            let reason = format!(
                "does not go with the regular expression `{target}`: write the indices in it, or \
                 name the layers by patterns without `re:`"
            );
            return Err(config("layers_to_transform", reason));
        }
        for (key, rank) in &fields.rank_pattern {
            check_rank(*rank, fields.lora_a_init)
                .map_err(|reason| config("rank_pattern", format!("`{key}`: {reason}")))?;
        }
        for (key, alpha) in &fields.alpha_pattern {
            check_alpha(*alpha)
                .map_err(|reason| config("alpha_pattern", format!("`{key}`: {reason}")))?;
        }
        self.adapter().map(drop)
    }

    /// NeMo's fields by name, and those of PEFT's that are set, as JSON values.
    ///
    /// # Errors
    /// An [`Error::Config`] for a value that no adapter can have.
    pub fn to_dict(&self) -> Result<Map<String, Value>> {
        self.validate()?;
        match serde_json::to_value(&self.fields) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => Err(config("to_dict", format!("{other} is no map"))),
            Err(error) => Err(config("to_dict", error.to_string())),
        }
    }

    /// Reads the fields by name; absent ones have their defaults.
    ///
    /// # Errors
    /// An [`Error::Config`] for an unknown key, a value of the wrong kind, and a value that no
    /// adapter can have.
    pub fn from_dict(fields: &Map<String, Value>) -> Result<Self> {
        let fields: Fields = serde_json::from_value(Value::Object(fields.clone()))
            .map_err(|error| config("from_dict", error.to_string()))?;
        Self::try_from(fields)
    }
}

impl TryFrom<Fields> for PeftConfig {
    type Error = Error;

    fn try_from(fields: Fields) -> Result<Self> {
        let fields = fields.normalised();
        let config = Self { fields };
        config.validate()?;
        Ok(config)
    }
}

impl Serialize for PeftConfig {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.validate().map_err(S::Error::custom)?;
        self.fields.serialize(to)
    }
}

const DTYPES: &str = "float32, float64, bfloat16 or float16";

pub(crate) fn is_adapter_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
}

fn config(field: &'static str, reason: impl Into<String>) -> Error {
    Error::Config {
        field,
        reason: reason.into(),
    }
}

fn strings(names: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
    names.into_iter().map(Into::into).collect()
}
