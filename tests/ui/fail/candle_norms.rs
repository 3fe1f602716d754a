use lora_core::LoraTargets;

#[derive(LoraTargets)]
struct Model {
    norm: candle_nn::RmsNorm,
    layer_norm: candle_nn::LayerNorm,
}

fn main() {}
