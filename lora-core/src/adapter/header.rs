//! The header of a safetensors file.
//!
//! Eight bytes say how long the header is; the header is JSON and says of each tensor its type,
//! shape and place; the rest are the numbers.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Read, Write},
};

use candle_core::{DType, Tensor};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, SeqAccess, Visitor},
};

use super::entry::{Entry, MAX_AXES};

/// The longest header that any reader of this format accepts.
const LONGEST: u64 = 100_000_000;

const METADATA: &str = "__metadata__";

/// What the file says of itself, all of it checked against the file's length.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, Entry>,
}

impl Header {
    /// Reads the header of a file of `len` bytes, or says all that is wrong with it.
    pub fn read(from: &mut impl Read, len: u64) -> Result<Self, Vec<String>> {
        let mut length = [0; 8];
        from.read_exact(&mut length)
            .map_err(|_| vec![format!("has {len} bytes, too few for a safetensors file")])?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST {
            return Err(vec![format!(
                "claims a header of {length} bytes; no more than {LONGEST} are read"
            )]);
        }
        let rest = len.saturating_sub(8);
        if length > rest {
            return Err(vec![format!(
                "is truncated: it claims a header of {length} bytes and has {rest}"
            )]);
        }
        let mut text = vec![0; length as usize];
        from.read_exact(&mut text)
            .map_err(|error| vec![format!("can't be read: {error}")])?;
        let parsed: Parsed = serde_json::from_slice(&text)
            .map_err(|error| vec![format!("the header is broken: {error}")])?;
        parsed.checked(8 + length, len)
    }
}

/// The header's text, not yet checked.
struct Parsed {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Place>,
    problems: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

impl Parsed {
    fn checked(self, data: u64, len: u64) -> Result<Header, Vec<String>> {
        let mut problems = self.problems;
        let mut tensors = BTreeMap::new();
        let mut places = Vec::new();
        for (name, place) in self.tensors {
            let (start, end) = place.data_offsets;
            match place.entry(data) {
                Ok(entry) => {
                    places.push((start, end, name.clone()));
                    tensors.insert(name, entry);
                }
                Err(problem) => problems.push(format!("`{name}` {problem}")),
            }
        }
        // Every byte belongs to one tensor: no overlap lets a small file stand for a large one.
        places.sort();
        let mut at = 0;
        for (start, end, name) in &places {
            if *start != at && problems.is_empty() {
                let what = if *start < at {
                    "overlaps others"
                } else {
                    "leaves a gap"
                };
                problems.push(format!(
                    "`{name}` {what}: it begins at byte {start}, not {at}"
                ));
            }
            at = *end;
            if at > len - data {
                problems.push(format!(
                    "`{name}` ends at byte {at}, but the file has {} bytes of numbers: truncated",
                    len - data
                ));
            }
        }
        if problems.is_empty() && at != len - data {
            problems.push(format!(
                "has {} bytes after its last tensor",
                len - data - at
            ));
        }
        if problems.is_empty() {
            let metadata = self.metadata;
            Ok(Header { metadata, tensors })
        } else {
            Err(problems)
        }
    }
}

impl Place {
    fn entry(self, data: u64) -> Result<Entry, String> {
        let known = TYPES.iter().find(|(name, _)| *name == self.dtype);
        let (_, dtype) =
            known.ok_or_else(|| format!("has type {:?}, which is not supported", self.dtype))?;
        let too_large = || "is larger than memory".to_string();
        let (start, end) = self.data_offsets;
        let begin = data.checked_add(start).ok_or_else(too_large)?;
        let entry = Entry::contiguous(*dtype, self.shape.0, begin).ok_or_else(too_large)?;
        let bytes = entry.bytes().ok_or_else(too_large)?;
        if end.checked_sub(start) != Some(bytes) {
            return Err(format!(
                "of shape {:?} and type {} has {bytes} bytes, but its place is {start}..{end}",
                entry.shape, self.dtype
            ));
        }
        Ok(entry)
    }
}

/// The types of the format that candle has as well.
const TYPES: [(&str, DType); 10] = [
    ("F64", DType::F64),
    ("F32", DType::F32),
    ("F16", DType::F16),
    ("BF16", DType::BF16),
    ("F8_E4M3", DType::F8E4M3),
    ("I64", DType::I64),
    ("I32", DType::I32),
    ("I16", DType::I16),
    ("U32", DType::U32),
    ("U8", DType::U8),
];

/// Writes a file: the same tensors and metadata give the same bytes.
///
/// Types of more bytes come first, so that every number is aligned; then names decide.
pub(super) fn write(
    to: &mut impl Write,
    metadata: &BTreeMap<&str, String>,
    tensors: &BTreeMap<String, Tensor>,
) -> io::Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let mut fields = vec![format!("{:?}:{}", METADATA, json(metadata)?)];
    let mut at = 0;
    for (name, tensor) in &order {
        let dtype = tensor.dtype();
        let known = TYPES.iter().find(|(_, known)| *known == dtype);
        let (known, _) = known.ok_or_else(|| {
            io::Error::other(format!(
                "`{name}`: {} has no name in the format",
                dtype.as_str()
            ))
        })?;
        let end = at + super::tensors::size(tensor);
        fields.push(format!(
            r#"{}:{{"dtype":"{known}","shape":{},"data_offsets":[{at},{end}]}}"#,
            json(name)?,
            json(tensor.dims())?,
        ));
        at = end;
    }
    let mut header = format!("{{{}}}", fields.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(header.as_bytes())?;
    for (_, tensor) in order {
        to.write_all(&safetensors::View::data(tensor))?;
    }
    Ok(())
}

fn json<T: Serialize + ?Sized>(value: &T) -> io::Result<String> {
    serde_json::to_string(value).map_err(io::Error::other)
}

/// A shape of few enough axes that a long list of them takes no memory.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Axes;

        impl<'de> Visitor<'de> for Axes {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_AXES} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Shape, A::Error> {
                let mut axes = Vec::new();
                while let Some(axis) = from.next_element()? {
                    if axes.len() == MAX_AXES {
                        return Err(serde::de::Error::invalid_length(MAX_AXES + 1, &self));
                    }
                    axes.push(axis);
                }
                Ok(Shape(axes))
            }
        }

        from.deserialize_seq(Axes)
    }
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = Parsed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Parsed, A::Error> {
                let mut parsed = Parsed {
                    metadata: BTreeMap::new(),
                    tensors: BTreeMap::new(),
                    problems: Vec::new(),
                };
                let mut described = false;
                while let Some(name) = from.next_key::<String>()? {
                    let twice = if name == METADATA {
                        let Metadata(fields) = from.next_value()?;
                        parsed.metadata = fields;
                        std::mem::replace(&mut described, true)
                    } else {
                        parsed
                            .tensors
                            .insert(name.clone(), from.next_value()?)
                            .is_some()
                    };
                    if twice {
                        parsed
                            .problems
                            .push(format!("`{name}` stands in the header twice"));
                    }
                }
                Ok(parsed)
            }
        }

        from.deserialize_map(Tensors)
    }
}

/// Texts by name, no name twice.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Metadata, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((key, text)) = from.next_entry::<String, String>()? {
                    if fields.insert(key.clone(), text).is_some() {
                        let reason = format!("`{key}` stands in {METADATA} twice");
                        return Err(serde::de::Error::custom(reason));
                    }
                }
                Ok(Metadata(fields))
            }
        }

        from.deserialize_map(Texts)
    }
}
