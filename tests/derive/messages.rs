//! A name that no layer has: the compiler and the running program say the same.

use lora_core::{LoraTargets, PeftConfig, nn::Linear};

use crate::support::linear;

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

fn message(pattern: &str) -> String {
    let mut model = Llama {
        layers: vec![Attention {
            q_proj: linear(),
            k_proj: linear(),
            v_proj: linear(),
            o_proj: linear(),
        }],
        lm_head: linear(),
    };
    let config = PeftConfig::new([pattern]);
    model
        .apply_lora(&config)
        .expect_err("no such layer")
        .to_string()
}

#[test]
fn the_running_program_says_what_the_compiler_says() {
    const COMPILER: &str = include_str!("../ui/fail/target_misspelt.stderr");
    for pattern in ["*.q_porj", "*.lm_head", "layers.one.v_proj"] {
        let message = message(pattern);
        assert!(COMPILER.contains(&message), "{message}");
    }
}

#[test]
fn the_nearest_path_comes_first() {
    assert_eq!(
        message("*.v_prj"),
        "no linear layer of `Llama` matches `*.v_prj`; nearest: `layers.*.v_proj`, \
         `layers.*.q_proj`, `layers.*.k_proj`"
    );
    assert!(message("head").contains("nearest: `lm_head`"));
}
