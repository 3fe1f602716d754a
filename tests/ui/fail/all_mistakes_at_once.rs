use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
#[lora(head)]
struct Model {
    #[lora(skp)]
    a: Linear,
    #[lora(skip, flatten)]
    b: Linear,
    #[lora(rename = "")]
    c: Linear,
    #[lora(rename = "a")]
    d: Linear,
}

fn main() {}
