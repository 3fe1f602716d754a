//! The names of a file's tensors, sorted by what they are of.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    key::{self, Key, PREFIX, Part},
    settings::Settings,
};
use crate::BiasMode;

/// The names in the file of a layer's tensors.
pub(super) type Parts = BTreeMap<Part, String>;

/// What a file holds, by its names alone.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Of the adapters, by the layer's path.
    pub layers: BTreeMap<String, Parts>,
    /// Of whole tensors, by `<module path>.<parameter>`. With `bias` PEFT writes a bias of a module
    /// to save twice.
    pub saved: BTreeMap<String, Vec<String>>,
    /// Of weights of the base that adapted layers have.
    pub base: BTreeMap<String, String>,
    /// One line for each name that is wrong.
    pub problems: Vec<String>,
    /// One line for each tensor that is not needed.
    pub notes: Vec<String>,
}

impl Names {
    /// Sorts the names.
    pub fn of<'a>(names: impl Iterator<Item = &'a str>, settings: &Settings) -> Self {
        let mut sorted = Self::default();
        let mut adapters = BTreeSet::new();
        for name in names {
            let owned = name.to_string();
            let twin = match key::parse(name) {
                Ok(Key::Lora {
                    path,
                    part,
                    adapter,
                }) => {
                    adapters.extend(adapter);
                    sorted.layers.entry(path).or_default().insert(part, owned)
                }
                Ok(Key::Saved(path)) if is_called_for(&path, settings) => {
                    sorted.saved.entry(path).or_default().push(owned);
                    None
                }
                Ok(Key::Saved(_)) => {
                    sorted.problems.push(format!(
                        "`{name}` is not `{PREFIX}<layer>.lora_A.weight` or `.lora_B.weight`, \
                         and neither modules_to_save nor bias calls for it"
                    ));
                    None
                }
                Ok(Key::Base(path)) => {
                    sorted
                        .notes
                        .push(format!("`{name}` is a weight of the base"));
                    sorted.base.insert(path, owned)
                }
                Ok(Key::Original) => {
                    sorted.notes.push(format!(
                        "`{name}` is of the base, in a module that the adapter replaces"
                    ));
                    None
                }
                Err(reason) => {
                    sorted.problems.push(format!("`{name}` {reason}"));
                    None
                }
            };
            if let Some(twin) = twin {
                sorted
                    .problems
                    .push(format!("`{name}` and `{twin}` are the same tensor"));
            }
        }
        if adapters.len() > 1 {
            let names: Vec<_> = adapters.into_iter().collect();
            sorted.problems.push(format!(
                "holds tensors of several adapters: {}; save each in its own folder",
                names.join(", ")
            ));
        }
        sorted
    }
}

/// Whether the configuration says that the whole tensor `name` was trained.
fn is_called_for(name: &str, settings: &Settings) -> bool {
    settings.bias != BiasMode::None && name.ends_with(".bias")
        || settings
            .modules_to_save
            .iter()
            .any(|entry| key::is_saved_by(name, entry))
}
