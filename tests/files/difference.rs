//! The difference of two adapters.

use candle_core::DType;
use lora_core::adapter::{Combination, Difference, Method};
use lora_tests::randn;

use crate::support::*;

#[test]
fn an_adapter_in_another_form_does_not_differ() {
    let mut adapter = plain();
    adapter
        .layers
        .get_mut("model.layers.0.q_proj")
        .unwrap()
        .rslora = true;
    assert!(Difference::between(&adapter, &adapter).unwrap().is_none());
    for layer in adapter.layers.values_mut() {
        layer.a = layer.a.to_dtype(DType::F64).unwrap();
        layer.b = layer.b.to_dtype(DType::F64).unwrap();
    }
    let refactored = Combination::new(Method::Linear)
        .apply(&[(&adapter, 1.0), (&adapter, 0.0)])
        .unwrap();
    let difference = Difference::between(&adapter, &refactored.adapter).unwrap();
    assert!(difference.is_none(), "{difference}");
    assert!(
        difference
            .sites
            .iter()
            .all(|site| (site.cosine.unwrap() - 1.0).abs() < 1e-12)
    );
}

#[test]
fn norms_and_cosines_are_those_of_the_deltas() {
    let (one, other) = (
        adapter([("q", layer(2, 3.0, 1))]),
        adapter([("q", layer(3, 4.0, 2))]),
    );
    let difference = Difference::between(&one, &other).unwrap();
    let site = &difference.sites[0];
    let deltas =
        [&one, &other].map(|adapter| lora_tests::to_vec(&adapter.layers["q"].delta().unwrap()));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let [x, y] = &deltas;
    let minus: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-12, "{got}, {want}");
    close(site.first_norm, dot(x, x).sqrt());
    close(site.second_norm, dot(y, y).sqrt());
    close(site.norm, dot(&minus, &minus).sqrt());
    close(
        site.cosine.unwrap(),
        dot(x, y) / (dot(x, x) * dot(y, y)).sqrt(),
    );
    assert_eq!((site.first_rank, site.second_rank), (Some(2), Some(3)));
}

#[test]
fn layers_and_tensors_of_one_side_are_listed() {
    let mut one = adapter([("k", layer(2, 3.0, 1)), ("q", layer(2, 3.0, 1))]);
    let mut other = adapter([("q", layer(2, 3.0, 1)), ("v", layer(2, 3.0, 2))]);
    one.saved
        .insert("head.weight".into(), randn(1, (2, 2), DType::F32));
    other
        .saved
        .insert("head.weight".into(), randn(2, (2, 2), DType::F32));
    other.layers.get_mut("q").unwrap().a = randn(1, (2, 7), DType::F32);
    let difference = Difference::between(&one, &other).unwrap();
    assert!(!difference.is_none());
    assert_says(
        &difference.to_string(),
        &[
            "only in the first",
            "only in the second",
            "shapes differ",
            "head.weight  differs",
            "3 of 3 layers and 1 whole",
        ],
    );
    let json = serde_json::to_value(&difference).unwrap();
    assert_eq!(json["sites"][0]["path"], "k");
    assert_eq!(json["sites"][0]["second_rank"], serde_json::Value::Null);
}

#[test]
fn a_bias_of_the_adapter_alone_is_a_difference() {
    let with = |seed: Option<u32>| {
        let mut layer = layer(2, 3.0, 1);
        layer.bias = seed.map(|seed| randn(seed, 4, DType::F32));
        adapter([("q", layer)])
    };
    let between = |one, other| Difference::between(&with(one), &with(other)).unwrap();
    assert!(between(Some(1), Some(1)).is_none());
    for (one, other) in [(Some(1), Some(2)), (Some(1), None), (None, Some(1))] {
        let difference = between(one, other);
        assert!(!difference.is_none() && difference.sites[0].norm < 1e-6);
        assert_says(
            &difference.to_string(),
            &["lora_bias differs", "1 of 1 layers"],
        );
    }
}
