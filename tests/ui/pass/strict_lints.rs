//! A crate with strict lints of its own.
#![deny(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    non_local_definitions,
    long_running_const_eval,
    warnings
)]
#![forbid(unsafe_code)]

use lora_core::{LoraTargets, nn::Linear, targets};

/// A model.
#[derive(LoraTargets)]
pub struct Model {
    q_proj: Linear,
}

fn main() {
    assert_eq!(targets!(Model: ["q_proj",]), ["q_proj"]);
    let layer = |model: Model| model.q_proj;
    let _ = layer;
}
