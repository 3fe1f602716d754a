use lora_core::{LoraTargets, nn::Linear, targets};

struct Rotary;

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    rotary: Rotary,
}

#[derive(LoraTargets)]
struct Model {
    layers: Vec<Attention>,
}

fn verbs(model: &mut Model) {
    let _ = targets!(Model: ["*.q_proj"]);
    let _ = model.merge();
}

fn main() {}
