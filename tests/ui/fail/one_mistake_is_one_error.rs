use lora_core::{LoraTargets, nn::Linear, targets};

#[derive(LoraTargets)]
struct Attention {
    #[lora(rename = "")]
    q_proj: Linear,
}

#[derive(LoraTargets)]
struct Model {
    layers: Vec<Attention>,
}

fn verbs(model: &mut Model) {
    let _ = targets!(Model: ["*.q_proj"]);
    let _ = targets!(Attention: ["q_proj"]);
    let _ = model.merge();
}

fn main() {}
