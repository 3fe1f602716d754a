//! Several adapters on one model.

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
