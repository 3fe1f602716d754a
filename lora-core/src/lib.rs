//! Declarative LoRA fine-tuning for candle models.
#![forbid(unsafe_code)]

mod error;
mod glob;
pub mod nn;
mod path;
mod registry;
mod suggest;
mod targets;
mod tree;
mod visit;

pub use error::{Error, Result};
pub use glob::Glob;
pub use lora_derive::LoraTargets;
pub use path::ModulePath;
pub use registry::{Registration, registry};
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
