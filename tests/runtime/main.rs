//! The runtime: configuration, the adapted linear layer, the verbs of a model, adapter folders.

mod adapter_folder;
mod apply;
mod config;
mod dropout;
mod golden;
mod linear;
mod llama;
mod model;
mod shared;
mod verbs;
