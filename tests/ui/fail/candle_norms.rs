use lora_core::LoraTargets;

#[derive(LoraTargets)]
struct Model {
    embed_tokens: candle_nn::Embedding,
    norm: candle_nn::RmsNorm,
    layer_norm: candle_nn::LayerNorm,
}

fn main() {}
