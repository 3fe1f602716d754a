//! Several adapters of one model, as PEFT saved them: alone, summed, one for each row, merged.

use std::{collections::HashMap, path::PathBuf};

use candle_core::Tensor;
use lora_core::LoraTargets;
use lora_examples::any_model::AnyModel;
use lora_tests::to_vec;

use crate::support::{assert_close, golden, open, tensors};

const NAMES: [&str; 3] = ["default", "wide", "late"];

/// PEFT's folder of a named adapter.
fn folder(name: &str) -> PathBuf {
    match name {
        "default" => golden("several"),
        _ => golden("several").join(name),
    }
}

fn load() -> (AnyModel, HashMap<String, Tensor>) {
    let mut model = open("untied");
    for name in NAMES {
        model.load_adapter_as(name, folder(name)).unwrap();
    }
    (model, tensors("several/expected.safetensors"))
}

#[test]
fn any_set_of_active_adapters_adds_up_as_in_peft() {
    let (mut model, expected) = load();
    for set in [
        "default",
        "wide",
        "late",
        "default+wide",
        "late+wide+default",
    ] {
        let names: Vec<_> = set.split('+').collect();
        let want = &expected[&format!("logits.{set}")];
        model.set_adapters(&names).unwrap();
        let got = model.forward(&expected["input_ids"], None).unwrap();
        assert_close(set, &got, want, 1e-5);

        let selection = model.adapters().unwrap().select(&names).unwrap();
        model.disable_adapters().unwrap();
        let got = model.forward(&expected["input_ids"], None).unwrap();
        assert_close(set, &got, &expected["logits"], 1e-5);
        model.enable_adapters().unwrap();
        model.set_adapters(&[""; 0]).unwrap();
        let got = selection.scope(|| model.forward(&expected["input_ids"], None));
        assert_close(set, &got.unwrap(), want, 1e-5);
    }
}

#[test]
fn rows_with_adapters_of_their_own_are_pefts_and_base_rows_are_untouched() {
    let (mut model, expected) = load();
    let ids = &expected["input_ids"];
    let rows = [
        Some("late"),
        Some("default"),
        None,
        Some("wide"),
        Some("default"),
    ];
    let selection = model.adapters().unwrap().rows(&rows).unwrap();
    let got = selection.scope(|| model.forward(ids, None)).unwrap();
    assert_close("rows", &got, &expected["logits.rows"], 1e-5);
    let base = open("untied").forward(ids, None).unwrap();
    assert_eq!(to_vec(&got.get(2).unwrap()), to_vec(&base.get(2).unwrap()));
}

#[test]
fn gradients_of_a_sum_reach_each_adapter_as_in_peft() {
    let (mut model, expected) = load();
    let active = ["default", "wide"];
    model.set_adapters(&active).unwrap();
    let logits = model.forward(&expected["input_ids"], None).unwrap();
    let loss = logits
        .mul(&expected["cotangent"])
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    let mut checked = 0;
    for name in active {
        for (path, var) in model.named_adapter_vars(name).unwrap() {
            let key = format!("grad.{name}.{path}");
            assert_close(&key, grads.get(&var).unwrap(), &expected[&key], 2e-5);
            checked += 1;
        }
    }
    let keys = expected.keys().filter(|key| key.starts_with("grad."));
    assert_eq!(checked, keys.count());
}

#[test]
fn merging_a_set_gives_pefts_weights() {
    let (mut model, expected) = load();
    model.merge_adapters(&["default", "wide"]).unwrap();
    let mut checked = 0;
    let visited = model.for_each_linear(&mut |path, linear| {
        if let Some(want) = expected.get(&format!("merged.{path}.weight")) {
            assert_close(&path.to_string(), linear.weight(), want, 1e-6);
            checked += 1;
        }
        Ok(())
    });
    visited.unwrap();
    assert_eq!(checked, 10);
    let got = model.forward(&expected["input_ids"], None).unwrap();
    assert_close("merged", &got, &expected["logits.default+wide"], 1e-5);
}
