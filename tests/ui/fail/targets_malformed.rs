use lora_core::{LoraTargets, nn::Linear, targets};

#[derive(LoraTargets)]
struct Model {
    q_proj: Linear,
}

const NAME: &str = "q_proj";

fn main() {
    let _ = targets!();
    let _ = targets!(Model, ["q_proj"]);
    let _ = targets!(Model: "q_proj");
    let _ = targets!(Model: []);
    let _ = targets!(Model: [""]);
    let _ = targets!(Model: ["q_proj", NAME, 3, format!("q_proj"), b"q_proj"]);
    let _ = targets!(Model: ["re:q_(proj|norm)"]);
    let _ = targets!(Model: ["q_proj"], dim = 3);
}
