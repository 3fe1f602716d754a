use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
struct Model {
    #[lora(skp)]
    a: Linear,
    #[lora(default)]
    b: Linear,
    #[lora(rename("c"))]
    c: Linear,
}

#[derive(LoraTargets)]
#[lora(krate = "lora_core")]
struct Other;

fn main() {}
