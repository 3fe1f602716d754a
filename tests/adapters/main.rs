//! Several adapters on one model.

mod folder;
mod join;
mod lora_bias;
mod merge;
mod model;
mod roster;
mod rows;
mod saved;
mod scope;
mod swap;
mod threads;
mod weighted;
