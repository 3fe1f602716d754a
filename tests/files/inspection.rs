//! What is told of an adapter.

use candle_core::DType;
use lora_core::adapter::{Inspection, LayerWeights};
use lora_tests::{randn, to_vec};

use crate::support::*;

#[test]
fn it_tells_ranks_scalings_norms_types_and_bytes() {
    let mut adapter = plain();
    let layer = adapter.layers.get_mut("model.layers.0.q_proj").unwrap();
    layer.rslora = true;
    layer.bias = Some(randn(1, 4, DType::F32));
    layer.b = layer.b.to_dtype(DType::BF16).unwrap();
    adapter
        .saved
        .insert("head.weight".into(), randn(1, (2, 3), DType::BF16));
    adapter.origin.base_model = Some("org/base".into());
    let inspection = Inspection::of(&adapter).unwrap();
    let site = &inspection.sites[0];
    assert_eq!((site.in_features, site.out_features, site.rank), (6, 4, 2));
    assert_eq!(site.scaling, 3.0 / 2f64.sqrt());
    assert_eq!(
        (site.dtype.as_str(), site.bytes),
        ("f32, bf16", 48 + 16 + 16)
    );
    let delta = to_vec(&adapter.layers["model.layers.0.q_proj"].delta().unwrap());
    let norm = delta.iter().map(|value| value * value).sum::<f64>().sqrt();
    assert!((site.norm / norm - 1.0).abs() < 1e-12);
    assert_eq!(inspection.parameters(), 2 * 20 + 4);
    assert_eq!(inspection.bytes(), 80 + 80 + 12);
    assert_says(
        &inspection.to_string(),
        &[
            "model.layers.0.q_proj",
            "6 x 4",
            "rslora",
            "bias",
            "head.weight  [2, 3]  bf16  12 bytes",
            "org/base",
            "2 layers, 1 whole",
        ],
    );
    assert_eq!(
        serde_json::to_value(&inspection).unwrap()["sites"][1]["rank"],
        2
    );
}

#[test]
fn a_rank_beyond_the_widths_costs_no_more_than_the_layer() {
    for (inputs, outputs, rank) in [(6, 4, 9), (4, 6, 9), (1, 1, 100_000), (3, 2, 50_000)] {
        let layer = LayerWeights {
            a: randn(1, (rank, inputs), DType::F32),
            b: randn(2, (outputs, rank), DType::F32),
            bias: None,
            alpha: 3.0,
            rslora: false,
        };
        let delta = to_vec(&layer.delta().unwrap());
        let norm = delta.iter().map(|value| value * value).sum::<f64>().sqrt();
        let inspection = Inspection::of(&adapter([("q", layer)])).unwrap();
        assert!((inspection.sites[0].norm / norm - 1.0).abs() < 1e-10);
    }
}
