use candle_nn::Linear;
use lora_core::LoraTargets;

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    v_proj: Option<candle_nn::Linear>,
}

#[derive(LoraTargets)]
struct Model {
    layers: Vec<Attention>,
}

fn main() {}
