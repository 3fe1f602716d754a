use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(skip = true)]
    a: Linear,
    #[lora(head = "a")]
    b: Linear,
}

fn main() {}
