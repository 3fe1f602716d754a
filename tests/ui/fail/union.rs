use lora_core::LoraTargets;

#[derive(LoraTargets)]
union Model {
    a: u32,
    b: f32,
}

fn main() {}
