use lora_core::{LoraTargets, nn::Linear};

#[derive(LoraTargets)]
enum Choice {
    #[lora(skip)]
    One(Linear),
    #[lora(other)]
    Two,
}

fn main() {}
