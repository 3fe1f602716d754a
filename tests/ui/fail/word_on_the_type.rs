use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
#[lora(head)]
struct Model {
    out: Linear,
}

#[derive(LoraTargets)]
#[lora(rename = "it")]
enum Choice {
    It(Linear),
}

fn main() {}
