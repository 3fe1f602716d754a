//! What a field is called, and what its attributes change about it.

use lora_core::{LoraTargets, nn::Linear};

use crate::support::{linear, visited_with_heads};

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    v_proj: Linear,
}

fn attention() -> Attention {
    Attention {
        q_proj: linear(),
        v_proj: linear(),
    }
}

struct Rotary;

#[test]
fn a_skipped_field_is_not_visited_and_may_have_any_type() {
    #[derive(LoraTargets)]
    struct Model {
        #[lora(skip)]
        _rotary: Rotary,
        #[lora(skip)]
        _frozen: candle_nn::Linear,
        #[lora(skip)]
        kept_out: Linear,
        out: Linear,
    }
    let tensor =
        candle_core::Tensor::zeros((2, 2), candle_core::DType::F32, &candle_core::Device::Cpu);
    let mut model = Model {
        _rotary: Rotary,
        _frozen: candle_nn::Linear::new(tensor.unwrap(), None),
        kept_out: linear(),
        out: linear(),
    };
    assert_visits!(model, ["out"]);
    assert_visits!(model.kept_out, [""]);
    assert_eq!(Model::TARGETS.paths(), ["out"]);
}

#[test]
fn rename_gives_a_segment_or_several() {
    #[derive(LoraTargets)]
    struct Model {
        #[lora(rename = "gate_proj")]
        c_fc1: Linear,
        #[lora(rename = "model.layers")]
        blocks: Vec<Attention>,
        #[lora(rename = "0")]
        first: Linear,
    }
    let mut model = Model {
        c_fc1: linear(),
        blocks: vec![attention()],
        first: linear(),
    };
    assert_visits!(
        model,
        [
            "gate_proj",
            "model.layers.0.q_proj",
            "model.layers.0.v_proj",
            "0"
        ],
    );
}

#[test]
fn two_fields_may_swap_names() {
    #[derive(LoraTargets)]
    struct Model {
        #[lora(rename = "b")]
        a: Linear,
        #[lora(rename = "a")]
        b: Linear,
    }
    assert_visits!(
        Model {
            a: linear(),
            b: linear()
        },
        ["b", "a"]
    );
}

#[test]
fn rename_names_the_field_of_a_newtype() {
    #[derive(LoraTargets)]
    struct Output(#[lora(rename = "dense")] Linear);
    assert_visits!(Output(linear()), ["dense"]);
}

#[test]
fn flatten_adds_no_segment() {
    #[derive(LoraTargets)]
    struct Model {
        #[lora(flatten)]
        attention: Attention,
        #[lora(flatten)]
        more: Vec<Linear>,
        out: Linear,
    }
    let mut model = Model {
        attention: attention(),
        more: vec![linear()],
        out: linear(),
    };
    assert_visits!(model, ["q_proj", "v_proj", "0", "out"]);
    assert_eq!(Model::TARGETS.paths(), ["q_proj", "v_proj", "*", "out"]);
}

#[test]
fn everything_below_the_head_is_the_head() {
    #[derive(LoraTargets)]
    struct Head {
        dense: Linear,
        #[lora(head)]
        out: Linear,
    }
    #[derive(LoraTargets)]
    struct Model {
        body: Linear,
        #[lora(head, rename = "lm_head")]
        head: Vec<Head>,
        #[lora(head, flatten)]
        flat: Attention,
        tail: Linear,
    }
    let mut model = Model {
        body: linear(),
        head: vec![Head {
            dense: linear(),
            out: linear(),
        }],
        flat: attention(),
        tail: linear(),
    };
    let seen = visited_with_heads(&mut model);
    let seen: Vec<_> = seen
        .iter()
        .map(|(path, head)| (path.as_str(), *head))
        .collect();
    assert_eq!(
        seen,
        [
            ("body", false),
            ("lm_head.0.dense", true),
            ("lm_head.0.out", true),
            ("q_proj", true),
            ("v_proj", true),
            ("tail", false),
        ],
    );
}

#[test]
fn a_raw_identifier_is_named_without_its_prefix() {
    #[derive(LoraTargets)]
    struct Model {
        r#type: Linear,
        r#match: Attention,
    }
    let mut model = Model {
        r#type: linear(),
        r#match: attention(),
    };
    assert_visits!(model, ["type", "match.q_proj", "match.v_proj"]);
}

#[test]
fn words_may_come_in_several_attributes() {
    #[derive(LoraTargets)]
    struct Model {
        #[lora(rename = "lm_head")]
        #[lora(head)]
        out: Linear,
    }
    assert_eq!(
        visited_with_heads(&mut Model { out: linear() }),
        [("lm_head".to_string(), true)],
    );
}
