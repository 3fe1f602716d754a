//! Declarative LoRA fine-tuning for candle models.
//!
//! Annotate a model, name the layers to adapt, train, save:
//!
//! ```
//! use candle_core::{DType, Device, Module, Result, Tensor};
//! use candle_nn::{AdamW, Optimizer, VarBuilder};
//! use lora_core::{LoraTargets, PeftConfig, targets};
//! use lora_core::nn::{Linear, RmsNorm, linear_no_bias, rms_norm};
//!
//! #[derive(LoraTargets)]
//! struct Block { norm: RmsNorm, up_proj: Linear, down_proj: Linear }
//!
//! #[derive(LoraTargets)]
//! struct Model { layers: Vec<Block>, #[lora(head)] lm_head: Linear }
//!
//! impl Model {
//!     fn new(vb: VarBuilder) -> Result<Self> {
//!         let block = |i| {
//!             let vb = vb.pp(format!("layers.{i}"));
//!             Ok(Block {
//!                 norm: rms_norm(8, 1e-5, vb.pp("norm"))?,
//!                 up_proj: linear_no_bias(8, 16, vb.pp("up_proj"))?,
//!                 down_proj: linear_no_bias(16, 8, vb.pp("down_proj"))?,
//!             })
//!         };
//!         let layers = (0..2).map(block).collect::<Result<_>>()?;
//!         Ok(Self { layers, lm_head: linear_no_bias(8, 4, vb.pp("lm_head"))? })
//!     }
//!
//!     fn forward(&self, xs: &Tensor) -> Result<Tensor> {
//!         let mut xs = xs.clone();
//!         for block in &self.layers {
//!             let ys = block.up_proj.forward(&block.norm.forward(&xs)?)?.gelu()?;
//!             xs = (xs + block.down_proj.forward(&ys)?)?;
//!         }
//!         self.lm_head.forward(&xs)
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! # let dir = std::env::temp_dir().join(format!("lora-core-doc-{}", std::process::id()));
//! # let vars = candle_nn::VarMap::new();
//! # let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let mut model = Model::new(vb)?;
//! let config = PeftConfig::new(targets!(Model: ["*.up_proj", "layers.1.down_proj"])).dim(4);
//! let applied = model.apply_lora(&config)?; // prints as a table
//! assert_eq!(applied.sites.len(), 3);
//!
//! let mut optimizer = AdamW::new_lr(model.lora_vars()?, 1e-2)?; // adapters, and nothing else
//! let xs = Tensor::randn(0f32, 1.0, (6, 8), &Device::Cpu)?;
//! let grads = model.forward(&xs)?.sqr()?.mean_all()?.backward()?;
//! model.check_gradients(&grads)?; // no adapter was cut off
//! optimizer.step(&grads)?;
//!
//! model.save_adapter(&dir)?; // adapter_model.safetensors, adapter_config.json
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok(())
//! # }
//! ```
//!
//! A misspelt target, `"*.up_porj"`, does not compile. Neither does a field whose type says
//! nothing about LoRA: derive [`LoraTargets`] for it too, or mark it `#[lora(skip)]`.
//!
//! - [`LoraTargets`]: the trait, its derive and the verbs of a model.
//! - [`targets!`]: target names checked by the compiler; [`Glob`] is their rule.
//! - [`PeftConfig`]: what to adapt, and how; [`LoraPlan`]: what will come of it.
//! - [`LinearLoRA`]: the adapted layer, and its formula.
//! - [`adapter`]: adapters apart from a model: their files, and arithmetic.
//! - [`nn`]: layers and functions of candle_nn's names that have a backward pass.
//! - [`registry`]: the adaptable models linked into a program.
#![forbid(unsafe_code)]

pub mod adapter;
mod adapter_folder;
mod adapters;
mod apply;
mod atomic;
mod config;
mod dropout;
mod error;
mod glob;
mod gradients;
mod init;
mod join;
mod linear_lora;
mod lora_adapter;
mod memory;
mod merged_backend;
pub mod nn;
mod op;
mod path;
mod philox;
mod plan;
mod registry;
mod report;
mod saved;
mod select;
mod selection;
mod suggest;
mod survey;
mod switch;
mod targets;
mod trained;
mod tree;
mod verbs;
mod visit;

pub use adapters::Adapters;
pub use apply::patch_linear_module;
pub use config::{AdapterConfig, BiasMode, PeftConfig};
pub use dropout::{DropoutPosition, Mask};
pub use error::{Error, Result};
pub use glob::Glob;
pub use init::LoraInit;
pub use linear_lora::LinearLoRA;
pub use lora_adapter::LoraAdapter;
pub use lora_derive::LoraTargets;
pub use memory::keep_freed_memory;
pub use merged_backend::MergedAdapters;
pub use op::ComputePath;
pub use path::ModulePath;
pub use philox::philox;
pub use plan::{LoraPlan, PlannedAdapter, PlannedTensor, SkippedLayer, TrainedFor};
pub use registry::{Registration, registry};
pub use report::{LoraReport, LoraSite};
pub use select::NotAdapted;
pub use selection::Selection;
pub use targets::LoraTargets;
pub use tree::{Field, TargetTree};
pub use verbs::AdapterStatus;
pub use visit::Visitor;

/// Not public API. Used by generated code.
#[doc(hidden)]
pub mod __private {
    pub use crate::suggest::check_target;
    pub use inventory;
    pub use lora_derive::targets;
}

extern crate self as lora_core;
