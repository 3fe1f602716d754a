use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    a: Linear,
    #[lora(rename = "a")]
    b: Linear,
    #[lora(rename = "d")]
    c: Linear,
    d: Linear,
}

#[derive(LoraTargets)]
enum Choice {
    Pair(#[lora(rename = "1")] Linear, Linear),
    Same { a: Linear },
}

fn main() {}
