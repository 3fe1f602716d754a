//! What to adapt and how: NeMo AutoModel's `PeftConfig`.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use serde_json::{Map, Value};

use crate::{DropoutPosition, Error, LoraInit, Result, op::compute_dtype};

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
/// under both names; it is on by default.
///
/// | field | default | meaning |
/// |---|---|---|
/// | `target_modules` | `[]` | patterns of the layers to adapt |
/// | `exclude_modules` | `[]` | patterns of layers to leave alone; they win over every other rule |
/// | `match_all_linear` | `false` | every linear layer but the output head; excludes `target_modules` |
/// | `dim` | 8 | the rank r |
/// | `alpha` | 32 | the adapter's output is scaled by `alpha / dim` |
/// | `dropout` | 0 | probability, 0 ≤ p < 1; in training only |
/// | `dropout_position` | `post` | on the adapter's output, or `pre`: on its input |
/// | `lora_A_init` | `xavier` | see [`LoraInit`] |
/// | `lora_dtype` | `None` | of the adapter; `None`: f64 over an f64 base, else f32 |
/// | `use_fused` | `true` | forward and backward as one operation each, or composed of candle's |
/// | `seed` | 0 | of the initialisation and of dropout |
///
/// With `exclude_modules` alone, every linear layer but the head and the excluded is adapted. A
/// configuration that names nothing is an error, and so is a pattern that matches nothing. A
/// pattern is a [`Glob`](crate::Glob), or after `re:` a regular expression that must cover the
/// whole path.
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

/// The values of [`PeftConfig`], checked or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Fields {
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) target_modules: Vec<String>,
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) exclude_modules: Vec<String>,
    pub(crate) match_all_linear: bool,
    pub(crate) dim: usize,
    #[serde(serialize_with = "integer_if_whole")]
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_position: DropoutPosition,
    #[serde(rename = "lora_A_init")]
    pub(crate) lora_a_init: LoraInit,
    #[serde(with = "dtype_name")]
    pub(crate) lora_dtype: Option<DType>,
    #[serde(alias = "use_triton")]
    pub(crate) use_fused: bool,
    pub(crate) seed: u64,
    pub(crate) use_rslora: bool,
    pub(crate) lora_bias: bool,
    pub(crate) bias: BiasMode,
    #[serde(deserialize_with = "one_or_many")]
    pub(crate) modules_to_save: Vec<String>,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            target_modules: Vec::new(),
            exclude_modules: Vec::new(),
            match_all_linear: false,
            dim: 8,
            alpha: 32.0,
            dropout: 0.0,
            dropout_position: DropoutPosition::Post,
            lora_a_init: LoraInit::Xavier,
            lora_dtype: None,
            use_fused: true,
            seed: 0,
            use_rslora: false,
            lora_bias: false,
            bias: BiasMode::None,
            modules_to_save: Vec::new(),
        }
    }
}

impl PeftConfig {
    /// Adapts the layers that any of `target_modules` names.
    pub fn new(target_modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            fields: Fields {
                target_modules: target_modules.into_iter().map(Into::into).collect(),
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
        self.fields.exclude_modules = patterns.into_iter().map(Into::into).collect();
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

    /// Gives every adapter a bias `[out]` of its own, which is scaled with it.
    pub fn lora_bias(mut self, lora_bias: bool) -> Self {
        self.fields.lora_bias = lora_bias;
        self
    }

    /// Chooses the biases of the base that are trained with the adapters.
    pub fn bias(mut self, bias: BiasMode) -> Self {
        self.fields.bias = bias;
        self
    }

    /// Names the modules that are trained whole and saved with the adapters.
    pub fn modules_to_save(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.fields.modules_to_save = names.into_iter().map(Into::into).collect();
        self
    }

    /// The patterns of the layers to adapt.
    pub fn target_modules(&self) -> &[String] {
        &self.fields.target_modules
    }

    /// The patterns of the layers to leave alone.
    pub fn exclude_modules(&self) -> &[String] {
        &self.fields.exclude_modules
    }

    /// Whether every linear layer but the head is adapted, be it asked for or for want of targets.
    pub fn match_all_linear(&self) -> bool {
        self.fields.match_all_linear
            || self.fields.target_modules.is_empty() && !self.fields.exclude_modules.is_empty()
    }

    /// What an adapter of the default rank and alpha is scaled by: `alpha / dim`, or with rsLoRA
    /// `alpha / √dim`.
    pub fn scaling(&self) -> f64 {
        scaling(self.fields.alpha, self.fields.dim, self.fields.use_rslora)
    }

    /// What each adapter looks like.
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
        if fields.match_all_linear && !fields.target_modules.is_empty() {
            return Err(config(
                "match_all_linear",
                "excludes target_modules: give either one or the other",
            ));
        }
        if !self.match_all_linear() && fields.target_modules.is_empty() {
            return Err(config(
                "target_modules",
                "names nothing: give patterns such as \"*.q_proj\", or set match_all_linear",
            ));
        }
        self.adapter().map(drop)
    }

    /// All fields by name, as JSON values.
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

/// What one adapter looks like: the part of [`PeftConfig`] that concerns a single layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    pub(crate) dim: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_position: DropoutPosition,
    pub(crate) lora_a_init: LoraInit,
    pub(crate) lora_dtype: Option<DType>,
    pub(crate) use_fused: bool,
    pub(crate) seed: u64,
    pub(crate) rslora: bool,
    pub(crate) lora_bias: bool,
}

/// The shape of an adapter on a given layer, its rank apart.
pub(crate) struct AdapterShape {
    pub inputs: usize,
    pub outputs: usize,
    /// The type of the adapter's numbers.
    pub dtype: DType,
}

impl AdapterConfig {
    /// What the adapter's output is multiplied by: `alpha / dim`, or with rsLoRA `alpha / √dim`.
    pub fn scaling(&self) -> f64 {
        scaling(self.alpha, self.dim, self.rslora)
    }

    /// The shape of the adapter on the layer at `path` with this `weight`.
    ///
    /// # Errors
    /// If the layer can't have one.
    pub(crate) fn fit(&self, path: &str, weight: &Tensor) -> Result<AdapterShape> {
        let (outputs, inputs) = weight.dims2().map_err(|_| {
            let shape = weight.shape();
            let reason = format!("the weight has shape {shape:?}; it must be [out, in]");
            Error::module(path, reason)
        })?;
        if !is_adapter_dtype(weight.dtype()) {
            let reason = format!("a base of {} can't be adapted", weight.dtype().as_str());
            return Err(Error::module(path, reason));
        }
        // The numbers are drawn in f64, and a vector holds at most `isize::MAX` bytes.
        let parameters = inputs.checked_add(outputs);
        let parameters = parameters.and_then(|numbers| self.dim.checked_mul(numbers));
        if parameters.is_none_or(|numbers| numbers > isize::MAX as usize / 8) {
            let reason = format!("an adapter of rank {} would fit in no memory", self.dim);
            return Err(Error::module(path, reason));
        }
        Ok(AdapterShape {
            inputs,
            outputs,
            dtype: self.lora_dtype.unwrap_or(compute_dtype(weight.dtype())),
        })
    }

    pub(crate) fn checked(self) -> Result<Self> {
        if self.dim == 0 {
            return Err(config("dim", "the rank is 0; it must be at least 1"));
        }
        if self.lora_a_init == LoraInit::Orthogonal && self.dim % 2 == 1 {
            let reason = format!(
                "the rank is {}; lora_A_init = orthogonal halves it, so it must be even",
                self.dim
            );
            return Err(config("dim", reason));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            let reason = format!(
                "{} is no positive number; the adapter could not act",
                self.alpha
            );
            return Err(config("alpha", reason));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let reason = format!("{} is no probability below 1", self.dropout);
            return Err(config("dropout", reason));
        }
        if let Some(dtype) = self.lora_dtype
            && !is_adapter_dtype(dtype)
        {
            let reason = format!("{} can't be trained; use {DTYPES}", dtype.as_str());
            return Err(config("lora_dtype", reason));
        }
        Ok(self)
    }
}

/// `alpha / rank`, or with rsLoRA `alpha / √rank` (Kalajdzievski 2023).
pub(crate) fn scaling(alpha: f64, rank: usize, rslora: bool) -> f64 {
    let rank = rank as f64;
    alpha / if rslora { rank.sqrt() } else { rank }
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

/// Reads a list of strings, a single string, or null for an empty list, as NeMo AutoModel does.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a list of strings")]
    enum OneOrMany {
        None(()),
        One(String),
        Many(Vec<String>),
    }

    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::None(()) => Vec::new(),
        OneOrMany::One(pattern) => vec![pattern],
        OneOrMany::Many(patterns) => patterns,
    })
}

/// Writes a whole number without a point: alpha is an integer in the Python stacks.
pub(crate) fn integer_if_whole<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT {
        to.serialize_i64(*value as i64)
    } else {
        to.serialize_f64(*value)
    }
}

/// `lora_dtype` by torch's names, with or without `torch.`, in any case.
mod dtype_name {
    use super::*;

    pub fn serialize<S: Serializer>(dtype: &Option<DType>, to: S) -> Result<S::Ok, S::Error> {
        dtype
            .map(|dtype| match dtype {
                DType::F32 => "float32",
                DType::F64 => "float64",
                DType::BF16 => "bfloat16",
                DType::F16 => "float16",
                other => other.as_str(),
            })
            .serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DType>, D::Error> {
        let Some(name) = Option::<String>::deserialize(from)? else {
            return Ok(None);
        };
        let lower = name.to_lowercase();
        match lower.strip_prefix("torch.").unwrap_or(&lower) {
            "float" | "float32" => Ok(Some(DType::F32)),
            "double" | "float64" => Ok(Some(DType::F64)),
            "bf16" | "bfloat16" => Ok(Some(DType::BF16)),
            "half" | "float16" => Ok(Some(DType::F16)),
            _ => Err(D::Error::custom(format!(
                "lora_dtype: `{name}` can't be trained; use {DTYPES}"
            ))),
        }
    }
}
