use lora_core::{LoraTargets, nn::Linear};

struct Rotary;

#[derive(LoraTargets)]
enum Model {
    Attention {
        q_proj: Linear,
        rotary: Vec<Option<Rotary>>,
    },
}

fn main() {}
