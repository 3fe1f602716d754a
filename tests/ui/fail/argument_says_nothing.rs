use lora_core::{LoraTargets, targets};

struct Rotary;

#[derive(LoraTargets)]
struct Layers<T> {
    layers: Vec<T>,
}

#[derive(LoraTargets)]
struct Model {
    encoder: Layers<Rotary>,
}

fn main() {
    targets!(Layers<Rotary>: ["*.q_proj"]);
}
