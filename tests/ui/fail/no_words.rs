use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora]
    a: Linear,
    #[lora()]
    b: Linear,
    #[lora = "skip"]
    c: Linear,
}

fn main() {}
