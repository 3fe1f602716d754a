//! A model in a crate with the strictest lints: the derive adds no warning of its own.
#![forbid(unsafe_code)]
#![deny(
    warnings,
    non_local_definitions,
    clippy::pedantic,
    clippy::nursery,
    missing_docs,
    missing_debug_implementations,
    trivial_casts,
    trivial_numeric_casts,
    unreachable_pub,
    unused_qualifications,
    unused_results,
    single_use_lifetimes,
    let_underscore_drop
)]

use lora_core::{LoraTargets, nn::Linear, targets};

use crate::support::linear;

/// Every kind of field.
#[derive(Debug, LoraTargets)]
struct Model<'a> {
    proj: Linear,
    #[lora(skip)]
    _text: &'a [u8],
    #[lora(rename = "model.layers")]
    layers: Vec<Option<Choice>>,
    #[lora(head)]
    head: Linear,
    #[lora(flatten)]
    flat: Unit,
}

/// Every kind of variant, two of which have the same traversal.
#[derive(Debug, LoraTargets)]
enum Choice {
    One(Linear),
    Other(Linear),
    Named { it: Linear },
    Unit,
}

/// Nothing.
#[derive(Debug, LoraTargets)]
struct Unit;

#[test]
fn the_model_is_one() {
    let names = targets!(Model<'static>: ["proj", "head"]);
    assert_eq!(names.len(), 2);
    let mut model = Model {
        proj: linear(),
        _text: b"text",
        layers: vec![
            Some(Choice::One(linear())),
            Some(Choice::Other(linear())),
            Some(Choice::Named { it: linear() }),
            Some(Choice::Unit),
            None,
        ],
        head: linear(),
        flat: Unit,
    };
    assert_visits!(
        model,
        [
            "proj",
            "model.layers.0",
            "model.layers.1",
            "model.layers.2.it",
            "head"
        ]
    );
}
