use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(crate = "lora_core")]
    out: Linear,
}

fn main() {}
