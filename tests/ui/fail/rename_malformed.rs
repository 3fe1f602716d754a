use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(rename = "")]
    a: Linear,
    #[lora(rename = "a..b")]
    b: Linear,
    #[lora(rename = "model.")]
    c: Linear,
    #[lora(rename = "layers.*")]
    d: Linear,
    #[lora(rename = "q proj")]
    e: Linear,
}

fn main() {}
