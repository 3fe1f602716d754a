//! The names of tensors: PEFT's, with and without what may stand around them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use lora_tests::randn;
use serde_json::json;

use crate::support::*;

/// The tensors of one layer under other names.
fn named(a: &str, b: &str) -> BTreeMap<String, Tensor> {
    BTreeMap::from([
        (a.to_string(), randn(1, (2, 6), DType::F32)),
        (b.to_string(), randn(2, (4, 2), DType::F32)),
    ])
}

#[test]
fn prefixes_wrappers_and_adapter_names_are_understood() {
    for (form, path) in [
        ("base_model.model.x.q_proj.lora_?.weight", "x.q_proj"),
        ("x.q_proj.lora_?.weight", "x.q_proj"),
        (
            "base_model.model.x.q_proj.lora_?.default.weight",
            "x.q_proj",
        ),
        ("base_model.model.x.q_proj.lora_?.weight.weight", "x.q_proj"),
        (
            "base_model.model._orig_mod.x.q_proj.lora_?.weight",
            "x.q_proj",
        ),
        (
            "_orig_mod.base_model.model.x.q_proj.lora_?.weight",
            "x.q_proj",
        ),
        (
            "base_model.model.x._checkpoint_wrapped_module.q_proj.lora_?.weight",
            "x.q_proj",
        ),
        ("module.base_model.model.x.q_proj.lora_?.weight", "x.q_proj"),
        // A module that is called like a part of PEFT's names.
        (
            "base_model.model.lora_A.weight.lora_?.weight",
            "lora_A.weight",
        ),
        ("base_model.model.my_lora_B.lora_?.weight", "my_lora_B"),
    ] {
        let tensors = named(&form.replace('?', "A"), &form.replace('?', "B"));
        let adapter = read(&config(json!({})), &tensors);
        let adapter = adapter.unwrap_or_else(|error| panic!("{form}: {error}"));
        assert_eq!(adapter.layers.keys().collect::<Vec<_>>(), [path], "{form}");
    }
}

#[test]
fn tensors_of_other_kinds_of_adapter_are_refused_by_name() {
    for (key, part) in [
        ("base_model.model.q_proj.lora_magnitude_vector", "DoRA"),
        (
            "base_model.model.q_proj.lora_magnitude_vector.default.weight",
            "DoRA",
        ),
        ("base_model.model.embed.lora_embedding_A", "embedding"),
        (
            "base_model.model.embed.token_adapter.trainable_tokens_delta",
            "trained tokens",
        ),
        (
            "base_model.model.experts.base_layer.lora_A.weight",
            "target_parameters",
        ),
        (
            "base_model.model.head.original_module.lora_A.weight",
            "frozen original",
        ),
        ("base_model.model.q_proj.lora_A.bias", "neither"),
        ("base_model.model.lora_A.weight", "no layer"),
        ("base_model.q_proj.lora_A.weight", "another prefix"),
        (
            "base_model.model.a..b.lora_A.weight",
            "empty or a foreign segment",
        ),
        (
            "base_model.model.../etc/passwd.lora_A.weight",
            "foreign segment",
        ),
        ("base_model.model.a\\b.lora_A.weight", "foreign segment"),
        ("base_model.model.a\nb.lora_A.weight", "foreign segment"),
        ("", "empty"),
        (
            "base_model.model.lm_head.weight",
            "is not `base_model.model.<layer>.lora_A.weight`",
        ),
        (
            "base_model.model.norm.bias",
            "neither modules_to_save nor bias",
        ),
    ] {
        let mut tensors = q_proj();
        tensors.insert(key.into(), randn(1, (2, 2), DType::F32));
        assert_says(&refusal(&config(json!({})), &tensors), &[key, part]);
    }
}

#[test]
fn every_problem_of_a_file_is_told_at_once() {
    let mut tensors = q_proj();
    tensors.remove("base_model.model.q_proj.lora_B.weight");
    tensors.insert(
        "base_model.model.k.lora_A.weight".into(),
        randn(1, (3, 6), DType::F32),
    );
    tensors.insert(
        "base_model.model.k.lora_B.weight".into(),
        randn(1, (4, 2), DType::F32),
    );
    tensors.insert(
        "base_model.model.v.lora_A.weight".into(),
        randn(1, 6, DType::F32),
    );
    tensors.insert(
        "base_model.model.v.lora_B.weight".into(),
        randn(1, (4, 2, 1, 1), DType::F32),
    );
    tensors.insert("lm_head.weight".into(), randn(1, (3, 5), DType::F32));
    assert_says(
        &refusal(&config(json!({})), &tensors),
        &[
            "`base_model.model.q_proj.lora_B.weight` is missing",
            "`base_model.model.k.lora_A.weight` has shape [3, 6], [rank, in]; with rank 2 (by r",
            "`base_model.model.v.lora_A.weight` has shape [6]; it must be [rank, in]",
            "adapts a convolution",
            "`lm_head.weight` is not `base_model.model.<layer>.lora_A.weight`",
        ],
    );
}

#[test]
fn the_same_tensor_under_two_names_is_refused() {
    let mut tensors = q_proj();
    tensors.insert(
        "q_proj.lora_A.default.weight".into(),
        randn(1, (2, 6), DType::F32),
    );
    assert_says(
        &refusal(&config(json!({})), &tensors),
        &["are the same tensor"],
    );
}

#[test]
fn tensors_of_two_adapters_in_one_file_are_refused() {
    let mut tensors = named("q.lora_A.one.weight", "q.lora_B.one.weight");
    tensors.extend(named("k.lora_A.two.weight", "k.lora_B.two.weight"));
    assert_says(
        &refusal(&config(json!({})), &tensors),
        &["several adapters: one, two"],
    );
}

#[test]
fn numbers_that_are_not_finite_and_types_that_are_no_numbers_are_refused() {
    for (value, dtype) in [
        (f64::NAN, DType::F32),
        (f64::INFINITY, DType::BF16),
        (f64::NAN, DType::F16),
    ] {
        let mut tensors = q_proj();
        let key = "base_model.model.q_proj.lora_B.weight";
        let broken = Tensor::full(value, (4, 2), &candle_core::Device::Cpu).unwrap();
        tensors.insert(key.into(), broken.to_dtype(dtype).unwrap());
        assert_says(
            &refusal(&config(json!({})), &tensors),
            &[key, "NaN or infinity"],
        );
    }
    let mut tensors = q_proj();
    let key = "base_model.model.q_proj.lora_A.weight";
    tensors.insert(
        key.into(),
        Tensor::ones((2, 6), DType::U8, &candle_core::Device::Cpu).unwrap(),
    );
    assert_says(
        &refusal(&config(json!({})), &tensors),
        &[key, "has type u8"],
    );
}

#[test]
fn modules_to_save_are_known_by_the_end_of_their_path() {
    let mut tensors = q_proj();
    for name in [
        "lm_head.weight",
        "head.dense.weight",
        "x.modules_to_save.default.weight",
    ] {
        tensors.insert(
            format!("base_model.model.{name}"),
            randn(1, (2, 2), DType::F32),
        );
    }
    let fields = json!({"modules_to_save": ["head", "x", "none"]});
    let adapter = read(&config(fields), &tensors).unwrap();
    let saved: Vec<_> = adapter.saved.keys().map(String::as_str).collect();
    assert_eq!(saved, ["head.dense.weight", "lm_head.weight", "x.weight"]);
    assert_eq!(adapter.notes, ["modules_to_save: `none` has no tensors"]);
}

#[test]
fn tensors_of_the_base_are_noted_and_left_out() {
    let mut tensors = q_proj();
    for key in [
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.head.original_module.weight",
        "base_model.model.head.original_module.dense.bias",
    ] {
        tensors.insert(key.into(), randn(1, (2, 2), DType::F32));
    }
    let adapter = read(&config(json!({})), &tensors).unwrap();
    assert!(adapter.saved.is_empty());
    assert_eq!(
        adapter.notes,
        [
            "`base_model.model.head.original_module.dense.bias` is of the base, in a module that \
             the adapter replaces",
            "`base_model.model.head.original_module.weight` is of the base, in a module that the \
             adapter replaces",
            "`base_model.model.lm_head.base_layer.weight` is a weight of the base",
        ]
    );
}

#[test]
fn a_saved_tensor_may_stand_in_a_file_twice_but_not_differ() {
    for (copy, name) in [
        ("head.modules_to_save.bias", "head.bias"),
        ("head.modules_to_save.default.bias", "head.bias"),
        ("head.modules_to_save.default.dense.bias", "head.dense.bias"),
    ] {
        let [copy_key, key] = [copy, name].map(|name| format!("base_model.model.{name}"));
        let mut tensors = q_proj();
        for key in [&copy_key, &key] {
            tensors.insert(key.clone(), randn(1, 3, DType::F32));
        }
        let fields = config(json!({"bias": "all", "modules_to_save": ["head"]}));
        let adapter = read(&fields, &tensors).unwrap();
        assert_eq!(adapter.saved.keys().collect::<Vec<_>>(), [name]);
        assert_eq!(adapter.notes.len(), 1, "{:?}", adapter.notes);
        assert!(adapter.notes[0].contains("is a copy of"));
        tensors.insert(copy_key.clone(), randn(2, 3, DType::F32));
        assert_says(
            &refusal(&fields, &tensors),
            &[&copy_key, &key, "but differ"],
        );
    }
}
