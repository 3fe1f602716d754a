use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(flatten, rename = "x")]
    a: Linear,
}

fn main() {}
