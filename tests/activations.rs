//! What a forward pass keeps for its backward pass. One test: the allocator counts the whole
//! process.

use std::alloc::System;

use candle_core::{DType, Device, Module, Tensor, Var};
use cap::Cap;
use lora_core::{DropoutPosition, LoraTargets, PeftConfig, nn::Linear};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
}

#[test]
fn a_layer_keeps_its_input_and_no_more_than_the_plan_says() {
    const TOKENS: usize = 4096;
    const WIDTH: usize = 64;
    /// Nodes of the graph, shapes and the like.
    const SLACK: usize = 16 * 1024;

    for (dtype, dropout) in [
        (DType::F32, 0.0),
        (DType::F32, 0.1),
        (DType::BF16, 0.0),
        (DType::BF16, 0.1),
    ] {
        for position in [DropoutPosition::Pre, DropoutPosition::Post] {
            let weight = || Tensor::zeros((WIDTH, WIDTH), dtype, &Device::Cpu).unwrap();
            let layer = || Linear::new(weight(), None);
            let mut model = Attention {
                q_proj: layer(),
                k_proj: layer(),
                v_proj: layer(),
            };
            let config = PeftConfig::all_linear().dim(4).dropout(dropout);
            let config = config.dropout_position(position);
            let plan = model.lora_plan(&config).unwrap();
            model.apply_lora(&config).unwrap();
            let xs = Tensor::ones((TOKENS, WIDTH), dtype, &Device::Cpu).unwrap();
            let xs = Var::from_tensor(&xs).unwrap();
            let forward = || {
                let layers = [&model.q_proj, &model.k_proj, &model.v_proj];
                layers.map(|layer| layer.forward(&xs).unwrap())
            };
            drop(forward()); // threads and their buffers
            let before = ALLOCATOR.allocated();
            let ys = forward();
            let kept = ALLOCATOR.allocated() - before;

            // The outputs are the caller's, and the input of all three was there before.
            let size = dtype.size_in_bytes();
            let outputs = 3 * TOKENS * WIDTH * size;
            let rank_products = TOKENS * (plan.saved_bytes_per_token() - 3 * WIDTH * size);
            assert!(
                kept <= outputs + rank_products + SLACK,
                "{dtype:?}, dropout {dropout} {position:?}: {kept} bytes, of which {outputs} are \
                 outputs; planned are {rank_products}"
            );
            drop(ys);
        }
    }
}
