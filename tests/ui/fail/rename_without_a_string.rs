use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(rename)]
    a: Linear,
    #[lora(rename = 3)]
    b: Linear,
    #[lora(rename = c)]
    c: Linear,
}

fn main() {}
