use lora_core::{LoraTargets, nn::Linear, targets};

#[derive(LoraTargets)]
struct Block {
    proj: Linear,
}

#[derive(LoraTargets)]
pub struct Encoder<T> {
    layers: Vec<T>,
}

#[derive(LoraTargets)]
struct Nothing;

mod models {
    pub use super::Encoder;
}

const NAMES: [&str; 1] = targets!(models::Encoder<Option<Block>>: ["layers.0.porj"]);

fn main() {
    let _ = (NAMES, targets!(Nothing: ["*"]));
}
