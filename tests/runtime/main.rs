//! The runtime: configuration, the adapted linear layer, the verbs of a model, adapter folders.

mod config;
mod golden;
mod linear;
mod llama;
mod model;
