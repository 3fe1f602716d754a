use std::sync::Arc;

use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    proj: Arc<Linear>,
}

fn main() {}
