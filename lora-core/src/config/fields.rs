//! The values of a configuration, and how they are read and written.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use candle_core::DType;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error as _, MapAccess, Visitor},
};

use super::{BiasMode, DTYPES};
use crate::{DropoutPosition, LoraInit, Result};

/// The values of a [`PeftConfig`](crate::PeftConfig), checked or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Fields {
    pub target_modules: Targets,
    #[serde(deserialize_with = "names")]
    pub exclude_modules: Vec<String>,
    pub match_all_linear: bool,
    pub dim: usize,
    #[serde(serialize_with = "integer_if_whole")]
    pub alpha: f64,
    pub dropout: f64,
    pub dropout_position: DropoutPosition,
    #[serde(rename = "lora_A_init", alias = "init_lora_weights")]
    pub lora_a_init: LoraInit,
    #[serde(with = "dtype_name")]
    pub lora_dtype: Option<DType>,
    #[serde(alias = "use_triton")]
    pub use_fused: bool,
    pub seed: u64,

    // PEFT's. They are written where they are set only, for readers that don't know them.
    #[serde(skip_serializing_if = "is_default")]
    pub use_rslora: bool,
    #[serde(deserialize_with = "patterns", skip_serializing_if = "is_default")]
    pub rank_pattern: BTreeMap<String, usize>,
    #[serde(
        deserialize_with = "patterns",
        serialize_with = "integers_if_whole",
        skip_serializing_if = "is_default"
    )]
    pub alpha_pattern: BTreeMap<String, f64>,
    #[serde(deserialize_with = "indices", skip_serializing_if = "is_default")]
    pub layers_to_transform: Vec<usize>,
    #[serde(deserialize_with = "names", skip_serializing_if = "is_default")]
    pub layers_pattern: Vec<String>,
    #[serde(deserialize_with = "names", skip_serializing_if = "is_default")]
    pub modules_to_save: Vec<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub bias: BiasMode,
    #[serde(skip_serializing_if = "is_default")]
    pub lora_bias: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            target_modules: Targets::default(),
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
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            bias: BiasMode::None,
            lora_bias: false,
        }
    }
}

impl Fields {
    /// Replaces PEFT's spelling of `match_all_linear` by that field.
    pub fn normalised(mut self) -> Self {
        if self.target_modules == Targets::AllLinear {
            self.target_modules = Targets::default();
            self.match_all_linear = true;
        }
        self
    }
}

/// The value of `target_modules`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Targets {
    Patterns(Vec<String>),
    /// The single string `all-linear`, PEFT's spelling of `match_all_linear`.
    AllLinear,
}

impl Targets {
    pub fn patterns(&self) -> &[String] {
        match self {
            Self::Patterns(patterns) => patterns,
            Self::AllLinear => &[],
        }
    }
}

impl Default for Targets {
    fn default() -> Self {
        Self::Patterns(Vec::new())
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Patterns(patterns) => patterns.serialize(to),
            Self::AllLinear => "all-linear".serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(match Names::deserialize(from)? {
            Names::One(name) if name.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            names => Self::Patterns(names.into()),
        })
    }
}

/// A list of strings, a single string, or null for an empty list, as the Python stacks have them.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a list of strings")]
enum Names {
    None(()),
    One(String),
    Many(Vec<String>),
}

impl From<Names> for Vec<String> {
    fn from(names: Names) -> Self {
        match names {
            Names::None(()) => Self::new(),
            Names::One(name) => vec![name],
            Names::Many(names) => names,
        }
    }
}

fn names<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Names::deserialize(from).map(Into::into)
}

/// Reads the indices of layers: one, a list, or null for none.
fn indices<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<usize>, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "layers_to_transform: expected the index of a layer or a list of them"
    )]
    enum Indices {
        None(()),
        One(usize),
        Many(Vec<usize>),
    }

    Ok(match Indices::deserialize(from)? {
        Indices::None(()) => Vec::new(),
        Indices::One(index) => vec![index],
        Indices::Many(indices) => indices,
    })
}

/// Reads a map of patterns, or null for an empty one; a pattern that is given twice is an error.
fn patterns<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    from: D,
) -> Result<BTreeMap<String, T>, D::Error> {
    struct Patterns<T>(PhantomData<T>);

    impl<'de, T: DeserializeOwned> Visitor<'de> for Patterns<T> {
        type Value = BTreeMap<String, T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of patterns")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((pattern, value)) = from.next_entry::<String, T>()? {
                if map.contains_key(&pattern) {
                    let message = format!("the pattern `{pattern}` is given twice");
                    return Err(A::Error::custom(message));
                }
                map.insert(pattern, value);
            }
            Ok(map)
        }
    }

    from.deserialize_any(Patterns(PhantomData))
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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

fn integers_if_whole<S: Serializer>(
    values: &BTreeMap<String, f64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(transparent)]
    struct Number(#[serde(serialize_with = "integer_if_whole")] f64);

    to.collect_map(values.iter().map(|(key, value)| (key, Number(*value))))
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
