use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(head, head)]
    a: Linear,
    #[lora(rename = "x")]
    #[lora(rename = "y")]
    b: Linear,
}

fn main() {}
