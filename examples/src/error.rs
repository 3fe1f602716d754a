use std::io;
use std::path::Path;
use std::path::PathBuf;

/// What can go wrong between a file of the user's and a trained adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A JSON file does not parse.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The model's architecture is none of the ones this package knows.
    #[error(
        "architecture `{found}` is not supported; supported are LlamaForCausalLM, \
         MistralForCausalLM and Qwen2ForCausalLM"
    )]
    Architecture {
        /// The architecture that the model files name.
        found: String,
    },
    /// A field of a model configuration is missing, mistyped or asks for something unsupported.
    #[error("model configuration: `{field}` {problem}")]
    Config {
        /// Name of the field, as in `config.json` or in the GGUF metadata.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A model file is damaged, incomplete or holds something unsupported.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A tokenizer cannot be built or used.
    #[error("tokenizer: {problem}")]
    Tokenizer {
        /// What is wrong with it.
        problem: String,
    },
    /// A row of a data file is unusable.
    #[error("{}:{line}: {problem}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// The field and what is wrong with it.
        problem: String,
    },
    /// The default model cannot be fetched.
    #[error("cannot fetch the default model: {problem}")]
    Fetch {
        /// What was tried and what to do.
        problem: String,
    },
    /// An option or argument makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Adapters cannot be attached, loaded or saved.
    #[error(transparent)]
    Lora(#[from] lora_core::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result with this package's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err` after an operation on `path`.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::Io {
            path: path.into(),
            source,
        }
    }

    /// An error about the model file or folder at `path`.
    pub fn model(path: &Path, problem: impl Into<String>) -> Error {
        Error::Model {
            path: path.into(),
            problem: problem.into(),
        }
    }

    /// An error about one field of a model configuration.
    pub fn config(field: impl Into<String>, problem: impl Into<String>) -> Error {
        Error::Config {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// An error of the `tokenizers` crate.
    pub fn tokenizer(problem: impl ToString) -> Error {
        Error::Tokenizer {
            problem: problem.to_string(),
        }
    }
}

/// Lets our loaders report through candle's `VarBuilder`.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
