use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
#[lora(crate = "not a path")]
struct Model {
    out: Linear,
}

#[derive(LoraTargets)]
#[lora(crate)]
struct Other {
    out: Linear,
}

fn main() {}
