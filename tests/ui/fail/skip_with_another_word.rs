use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(skip, rename = "x")]
    a: Linear,
    #[lora(head, skip)]
    b: Linear,
    #[lora(skip, flatten)]
    c: Linear,
}

fn main() {}
