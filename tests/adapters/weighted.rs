//! Sums with weights: the scale of an adapter for one selection.

use candle_core::{DType, Module};
use lora_core::LoraTargets;
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

#[test]
fn a_weight_scales_what_an_adapter_adds_and_goes_with_its_selection() {
    let mut model = Model::with_three(DType::F64);
    let layer = model.layers[1].q_proj.clone();
    let xs = lora_tests::randn(4, (5, 12), DType::F64);
    let adapters = model.adapters().unwrap();
    let run = |parts: &[(&str, f64)]| {
        let selection = adapters.weighted(parts).unwrap();
        selection.scope(|| layer.forward(&xs)).unwrap()
    };
    let base = run(&[]);
    let [a, b] = ["a", "b"].map(|name| (run(&[(name, 1.0)]) - &base).unwrap());
    let want = ((&base + (a * 0.25).unwrap()).unwrap() - (b * 2.0).unwrap()).unwrap();
    let got = run(&[("a", 0.25), ("b", -2.0)]);
    assert!(relative_error(&got, &want) < 1e-13);
    assert_eq!(to_vec(&run(&[("a", 1.0)])), {
        let a = adapters.select(&["a"]).unwrap();
        to_vec(&a.scope(|| layer.forward(&xs)).unwrap())
    });
}

#[test]
fn a_weighted_sum_merges_as_it_computes() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    adapters
        .set(&adapters.weighted(&[("b", -0.5), ("a", 3.0)]).unwrap())
        .unwrap();
    let want = model.forward(&ids(2)).unwrap();
    model.merge().unwrap();
    assert!(relative_error(&model.forward(&ids(2)).unwrap(), &want) < 1e-5);
    assert!(message(model.merge_adapters(&["b", "a"])).contains("`unmerge`"));
}

#[test]
fn impossible_weights_are_refused() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    for weight in [f64::NAN, f64::INFINITY] {
        let error = message(adapters.weighted(&[("a", weight)]));
        assert!(error.starts_with("adapter `a`: has the weight"), "{error}");
    }
}
