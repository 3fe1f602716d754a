//! What can go wrong, told with the name of the thing that is wrong and the way out.

use std::path::PathBuf;

/// The result of everything in this crate that is not a candle operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. Every message names the path, field, key or file concerned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value of [`PeftConfig`](crate::PeftConfig) that no adapter can have.
    #[error("PeftConfig.{field}: {reason}")]
    Config {
        /// The field, by its name in the configuration.
        field: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A target pattern that no linear layer answers to.
    #[error("{0}")]
    NoMatch(String),
    /// Something at one module of the model.
    #[error("{path}: {reason}")]
    Module {
        /// The dotted path of the module.
        path: String,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// Something with an adapter that is called by its name.
    #[error("adapter `{name}`: {reason}")]
    NamedAdapter {
        /// The name.
        name: String,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// A call for the adapters of a model without any.
    #[error("the model has no adapter; `add_adapter` or `load_adapter` one first")]
    NoAdapter,
    /// A change of the adapters while they are in the weights.
    #[error("the adapters are merged into the weights; `unmerge` first")]
    Merged,
    /// A mixed batch is selected where one set of adapters is needed.
    #[error(
        "adapters are selected row by row, which makes no one weight; `set_adapters` those to \
         merge, or name them"
    )]
    MixedBatch,
    /// A batch by rows that has none.
    #[error("a selection by rows needs at least one row")]
    NoRows,
    /// Adapters that a backward pass left without a gradient.
    #[error(
        "{} of {total} adapter tensors got no gradient: {}. \
         Most likely an operation between them and the loss cuts the graph: candle_nn's fused \
         `rms_norm`, `layer_norm`, `softmax_last_dim`, `rope`, `rope_i` and `sdpa` have no \
         backward; use those of `lora_core::nn`. A layer whose output the loss does not use gets \
         none either",
        .missing.len(), .missing.join(", ")
    )]
    NoGradient {
        /// The names of the tensors without a gradient, in the model's order.
        missing: Vec<String>,
        /// How many adapter tensors the model has.
        total: usize,
    },
    /// The tensors of an adapter file and the sites of the model do not agree.
    #[error("{}: {}", .file.display(), .problems.join("; "))]
    Checkpoint {
        /// The file that was read.
        file: PathBuf,
        /// One line for every missing, extra or mis-shaped key.
        problems: Vec<String>,
    },
    /// Tensors of an adapter that a model built with [`MergedAdapters`](crate::MergedAdapters)
    /// did not ask for.
    #[error("not merged: {}", .problems.join("; "))]
    Unmerged {
        /// One line for every tensor.
        problems: Vec<String>,
    },
    /// A file that cannot be read, written or understood.
    #[error("{}: {reason}", .file.display())]
    File {
        /// The file concerned.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something that adapters apart from a model don't allow.
    #[error("{0}")]
    Adapter(String),
    /// An error of a tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn module(path: impl ToString, reason: impl Into<String>) -> Self {
        Self::Module {
            path: path.to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn adapter(name: impl ToString, reason: impl Into<String>) -> Self {
        Self::NamedAdapter {
            name: name.to_string(),
            reason: reason.into(),
        }
    }

    pub(crate) fn file(file: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::File {
            file: file.into(),
            reason: reason.to_string(),
        }
    }
}
