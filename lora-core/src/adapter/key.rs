//! What the name of a tensor says.
//!
//! `base_model.model.<path>.lora_A.weight` is PEFT's form. Its prefix may be absent, the name of
//! an adapter may stand after `lora_A`, and wrappers may have left their segments.

/// The prefix that PEFT gives every name.
pub(super) const PREFIX: &str = "base_model.model.";

/// Segments that torch's wrappers insert; no module has these names.
const WRAPPERS: [&str; 2] = ["_orig_mod", "_checkpoint_wrapped_module"];

/// A tensor of a layer's adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    Bias,
}

impl Part {
    /// The end of its name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::Bias => "lora_B.bias",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A tensor of the adapter of the layer at `path`.
    Lora {
        path: String,
        part: Part,
        /// The adapter's name, if it stands in the key.
        adapter: Option<String>,
    },
    /// A whole tensor, `<module path>.<parameter>`.
    Saved(String),
    /// The frozen weight of an adapted layer, `<module path>.weight`: PEFT adds that of an output
    /// head.
    Base(String),
    /// A tensor of the module that one of `modules_to_save` stands for: PEFT's `bias` adds it.
    Original,
}

/// Reads a name, or says why it is none that an adapter of linear layers has.
pub(super) fn parse(key: &str) -> Result<Key, String> {
    let plain = |segment: &str| {
        !segment.is_empty() && !segment.contains(|c: char| c.is_control() || "/\\".contains(c))
    };
    if !key.split('.').all(plain) {
        return Err("has an empty or a foreign segment: it names no module".into());
    }
    let segments: Vec<&str> = key
        .split('.')
        .filter(|segment| !WRAPPERS.contains(segment))
        .collect();
    let mut segments = match segments.as_slice() {
        ["module", "base_model", "model", path @ ..] | ["base_model", "model", path @ ..] => {
            path.to_vec()
        }
        ["base_model", ..] => return Err(format!("has another prefix than `{PREFIX}`")),
        path => path.to_vec(),
    };
    if let Some(reason) = foreign(&segments) {
        return Err(reason.into());
    }

    let (last, adapter) = match segments.as_slice() {
        [.., "lora_A" | "lora_B", last] => (*last, None),
        [.., "lora_A" | "lora_B", adapter, last] => (*last, Some(adapter.to_string())),
        _ => return saved(segments),
    };
    segments.truncate(segments.len() - 1 - usize::from(adapter.is_some()));
    let part = match (segments.pop(), last) {
        (Some("lora_A"), "weight") => Part::A,
        (Some("lora_B"), "weight") => Part::B,
        (Some("lora_B"), "bias") => Part::Bias,
        _ => return Err("is neither `lora_A.weight`, `lora_B.weight` nor `lora_B.bias`".into()),
    };
    if segments.is_empty() {
        return Err("names no layer".into());
    }
    if segments.contains(&"base_layer") {
        return Err(
            "adapts a wrapped parameter or attention (target_parameters, MultiheadAttention); \
             only linear layers are supported"
                .into(),
        );
    }
    if segments.contains(&"original_module") {
        return Err("adapts the frozen original of a module to save".into());
    }
    Ok(Key::Lora {
        path: segments.join("."),
        part,
        adapter,
    })
}

/// A whole tensor's name without what PEFT's wrappers put into it.
fn saved(mut segments: Vec<&str>) -> Result<Key, String> {
    if segments.contains(&"original_module") {
        return Ok(Key::Original);
    }
    if let Some(at) = segments
        .iter()
        .position(|segment| *segment == "modules_to_save")
        && segments.len() > at + 1
    {
        // `<module>.modules_to_save.<adapter>.<parameter>`; the name may have been left out.
        let named = segments.len() > at + 2;
        segments.drain(at..=at + usize::from(named));
    }
    let is_base = match segments.as_slice() {
        [.., "base_layer", "bias"] => Some(false), // trained, by PEFT's `bias`
        [.., "base_layer", "weight"] => Some(true),
        _ => None,
    };
    if is_base.is_some() {
        segments.remove(segments.len() - 2);
    }
    if segments.len() < 2 {
        return Err("names no parameter of a module".into());
    }
    let name = segments.join(".");
    Ok(match is_base {
        Some(true) => Key::Base(name),
        _ => Key::Saved(name),
    })
}

/// Why a tensor belongs to another kind of adapter.
fn foreign(segments: &[&str]) -> Option<&'static str> {
    segments.iter().find_map(|segment| match *segment {
        "lora_embedding_A" | "lora_embedding_B" => {
            Some("adapts an embedding; only linear layers are supported")
        }
        "lora_magnitude_vector" | "lora_magnitude" => {
            Some("is of DoRA (use_dora), which is not supported")
        }
        "token_adapter" | "trainable_tokens_delta" => {
            Some("holds trained tokens (trainable_token_indices), which are not supported")
        }
        _ => None,
    })
}

/// The names in `target_modules` that mean the layer at `path`: the path itself, and its ends
/// from each dot on.
pub(super) fn ends(path: &str) -> impl Iterator<Item = &str> {
    let inner = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
    std::iter::once(path).chain(inner)
}

/// Whether the module that `entry` of `modules_to_save` means holds the tensor `name`: PEFT takes
/// an entry for the end of a module's path, even without a dot.
pub(super) fn is_saved_by(name: &str, entry: &str) -> bool {
    !entry.is_empty()
        && name
            .match_indices('.')
            .any(|(dot, _)| name[..dot].ends_with(entry))
}
