//! JSON as it was written: keys in order, no key twice.

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};

/// A JSON value. Objects keep the order of their keys, which matters to PEFT's patterns.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

/// An object's fields, in order.
pub(super) type Fields = Vec<(String, Json)>;

impl Json {
    /// Parses an object.
    pub fn object(bytes: &[u8]) -> Result<Fields, String> {
        match serde_json::from_slice(bytes).map_err(|error| error.to_string())? {
            Self::Object(fields) => Ok(fields),
            other => Err(format!("{other} is no object of named fields")),
        }
    }

    /// Whether a setting that we don't know is at rest.
    pub fn is_resting(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Bool(on) => !on,
            Self::Number(_) => false,
            Self::Text(text) => text.is_empty(),
            Self::Array(values) => values.is_empty(),
            Self::Object(fields) => fields.is_empty(),
        }
    }

    pub fn as_bool(&self) -> Result<bool, String> {
        match self {
            Self::Bool(value) => Ok(*value),
            other => Err(format!("{other} is neither true nor false")),
        }
    }

    /// A positive whole number.
    pub fn as_count(&self) -> Result<usize, String> {
        let whole = match self {
            Self::Number(number) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
            _ => None,
        };
        match whole {
            Some(count) if count > 0 => Ok(count),
            _ => Err(format!("{self} is no whole number from 1 on")),
        }
    }

    pub fn as_float(&self) -> Result<f64, String> {
        let float = match self {
            Self::Number(number) => number.as_f64().filter(|value| value.is_finite()),
            _ => None,
        };
        float.ok_or_else(|| format!("{self} is no number"))
    }

    pub fn as_text(&self) -> Result<&str, String> {
        match self {
            Self::Text(text) => Ok(text),
            other => Err(format!("{other} is no text")),
        }
    }

    pub fn as_texts(&self) -> Result<Vec<String>, String> {
        match self {
            Self::Array(values) => values
                .iter()
                .map(|value| value.as_text().map(str::to_string))
                .collect(),
            other => Err(format!("{other} is no list of names")),
        }
    }

    pub fn as_object(&self) -> Result<&[(String, Json)], String> {
        match self {
            Self::Object(fields) => Ok(fields),
            other => Err(format!("{other} is no object")),
        }
    }
}

/// Short: it stands in error messages.
impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 60;
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(text) if text.chars().count() <= LONGEST => write!(f, "{text:?}"),
            Self::Text(text) => {
                let start: String = text.chars().take(LONGEST).collect();
                write!(f, "{start:?}..")
            }
            Self::Array(values) => match values.as_slice() {
                [] => f.write_str("[]"),
                [one] if !matches!(one, Self::Array(_) | Self::Object(_)) => write!(f, "[{one}]"),
                many => write!(f, "a list of {}", many.len()),
            },
            Self::Object(fields) if fields.is_empty() => f.write_str("{}"),
            Self::Object(fields) => write!(f, "an object of {}", fields.len()),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Values;

        impl<'de> Visitor<'de> for Values {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Number(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Number(value.into()))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Json, E> {
                serde_json::Number::from_f64(value)
                    .map(Json::Number)
                    .ok_or_else(|| E::custom("a number that is not finite"))
            }

            fn visit_str<E>(self, value: &str) -> Result<Json, E> {
                Ok(Json::Text(value.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Json, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = from.next_element()? {
                    values.push(value);
                }
                Ok(Json::Array(values))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Json, A::Error> {
                let (mut fields, mut seen) = (Fields::new(), HashSet::new());
                while let Some((key, value)) = from.next_entry::<String, Json>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("`{key}` stands here twice")));
                    }
                    fields.push((key, value));
                }
                Ok(Json::Object(fields))
            }
        }

        from.deserialize_any(Values)
    }
}
