//! Adapters apart from any model: files, and arithmetic.
//!
//! [`AdapterWeights`] is what an adapter folder holds: the matrices of each adapted layer, whole
//! tensors that were trained with them, and how they act. It is read from PEFT's and NeMo
//! AutoModel's folders and written so that others read it.

mod combine;
mod config_file;
mod consumers;
mod dense;
mod difference;
mod entry;
mod fingerprint;
mod folder;
mod header;
mod inspection;
mod json;
mod key;
mod layer;
mod matrix;
mod names;
mod pattern;
mod pickle;
mod product;
mod reading;
mod settings;
mod sparse;
mod tensors;
mod universal;
mod writing;
mod zip;

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::{BiasMode, DropoutPosition, Error, Result};

pub use combine::{Combination, Combined, Method};
pub use consumers::Consumer;
pub use difference::{Difference, SiteDifference};
pub use fingerprint::Fingerprint;
pub(crate) use fingerprint::Sample;
pub use inspection::{InspectedSite, InspectedTensor, Inspection};
pub use layer::LayerWeights;
pub(crate) use reading::Reading;
pub use sparse::Election;

/// An adapter apart from any model: what an adapter folder holds.
#[derive(Clone, Debug, Default)]
pub struct AdapterWeights {
    /// The adapted linear layers by module path, e.g. `model.layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LayerWeights>,
    /// Whole tensors that were trained with it, by `<module path>.<parameter>`: those of
    /// `modules_to_save`, and the biases of base layers.
    pub saved: BTreeMap<String, Tensor>,
    /// The probability of dropout that it was trained with.
    pub dropout: f64,
    /// The side of the adapter that dropout applied to. PEFT's files can't say; theirs is `Pre`.
    pub dropout_position: DropoutPosition,
    /// Which base layers' biases are among `saved`.
    pub bias: BiasMode,
    /// The names of `modules_to_save` as in the configuration.
    pub modules_to_save: Vec<String>,
    /// Paths of layers that must stay without an adapter although their path ends like that of an
    /// adapted one: PEFT takes a target for the end of a path.
    pub excluded: Vec<String>,
    /// Where it came from.
    pub origin: Origin,
    /// What reading it noticed that is no error, such as a target without tensors.
    pub notes: Vec<String>,
}

/// Where an adapter came from: nothing here changes what it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// PEFT's `task_type`, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Of the base weights that it was trained on.
    pub fingerprint: Option<Fingerprint>,
}

/// A way to write an adapter folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// As PEFT writes it: each layer with its own rank and alpha.
    #[default]
    Peft,
    /// What PEFT, vLLM, llama.cpp's converter, mistral.rs and NeMo AutoModel read alike.
    Universal,
}

impl AdapterWeights {
    /// Reads an adapter folder, or a weights file that stands in one; tensors are on the CPU.
    ///
    /// # Errors
    /// An [`Error::File`] or [`Error::Checkpoint`] that names everything that is wrong.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Reading::of(path.as_ref())?.finish()
    }

    /// Reads all adapters of a folder by name: those in sub-directories, and as `default` the one
    /// of the folder itself.
    ///
    /// # Errors
    /// As [`read`](Self::read), for the first adapter that can't be; and if there is none.
    pub fn read_named(dir: impl AsRef<Path>) -> Result<BTreeMap<String, Self>> {
        let dir = dir.as_ref();
        let folders = folder::named(dir)?;
        if folders.is_empty() {
            let reason = "holds no folder with an adapter_config.json";
            return Err(Error::file(dir, reason));
        }
        folders
            .into_iter()
            .map(|(name, folder)| Ok((name, Self::read(folder)?)))
            .collect()
    }

    /// Writes an adapter folder.
    ///
    /// # Errors
    /// An [`Error::File`] for a folder that cannot be written, an [`Error::Checkpoint`] for what
    /// `profile` cannot express.
    pub fn write(&self, dir: impl AsRef<Path>, profile: Profile) -> Result<()> {
        writing::write(self, dir.as_ref(), profile)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "peft",
            Self::Universal => "universal",
        })
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "peft" => Ok(Self::Peft),
            "universal" => Ok(Self::Universal),
            _ => Err(format!(
                "unknown profile `{name}`; known are peft, universal"
            )),
        }
    }
}
