use lora_core::{LoraTargets, nn::Linear, targets};

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
}

#[derive(LoraTargets)]
struct Llama {
    layers: Vec<Attention>,
    #[lora(head)]
    lm_head: Linear,
}

fn main() {
    let _ = targets!(Llama: ["*.q_porj", "*.v_proj"]);
    let _ = targets!(Llama: [
        "lm_head",
        "*.lm_head",
        "layers.one.v_proj",
    ]);
}
