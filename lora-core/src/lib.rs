//! Declarative LoRA fine-tuning for candle models.
#![forbid(unsafe_code)]

mod adapter_folder;
mod apply;
mod atomic;
mod config;
mod dropout;
mod error;
mod glob;
mod gradients;
mod hf_config;
mod init;
mod linear_lora;
pub mod nn;
mod op;
mod path;
mod philox;
mod registry;
mod report;
mod select;
mod suggest;
mod survey;
mod targets;
mod tree;
mod visit;

pub use apply::patch_linear_module;
pub use config::{AdapterConfig, PeftConfig};
pub use dropout::{DropoutPosition, Mask};
pub use error::{Error, Result};
pub use glob::Glob;
pub use init::LoraInit;
pub use linear_lora::LinearLoRA;
pub use lora_derive::LoraTargets;
pub use path::ModulePath;
pub use philox::philox;
pub use registry::{Registration, registry};
pub use report::{LoraReport, LoraSite};
pub use targets::LoraTargets;
pub use tree::{Field, TargetTree};
pub use visit::Visitor;

/// Not public API. Used by generated code.
#[doc(hidden)]
pub mod __private {
    pub use crate::suggest::check_target;
    pub use inventory;
    pub use lora_derive::targets;
}

extern crate self as lora_core;
