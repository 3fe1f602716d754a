//! What these tests share: small adapters, and folders written without our own writer.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Tensor};
use lora_core::{
    Error,
    adapter::{AdapterWeights, LayerWeights},
};
use lora_tests::{randn, relative_error};
use serde_json::Value;

pub const WEIGHTS: &str = "adapter_model.safetensors";
pub const CONFIG: &str = "adapter_config.json";

/// An adapter of a layer of 6 inputs and 4 outputs.
pub fn layer(rank: usize, alpha: f64, seed: u32) -> LayerWeights {
    LayerWeights {
        a: randn(seed, (rank, 6), DType::F32),
        b: randn(seed + 1000, (4, rank), DType::F32),
        bias: None,
        alpha,
        rslora: false,
    }
}

/// An adapter of the given layers.
pub fn adapter<const N: usize>(layers: [(&str, LayerWeights); N]) -> AdapterWeights {
    AdapterWeights {
        layers: BTreeMap::from(layers.map(|(path, layer)| (path.to_string(), layer))),
        dropout_position: lora_core::DropoutPosition::Pre,
        ..AdapterWeights::default()
    }
}

/// A plain adapter of two layers.
pub fn plain() -> AdapterWeights {
    adapter([
        ("model.layers.0.q_proj", layer(2, 3.0, 1)),
        ("model.layers.1.v_proj", layer(2, 3.0, 2)),
    ])
}

/// The tensors of `q_proj` with rank 2, under PEFT's names.
pub fn q_proj() -> BTreeMap<String, Tensor> {
    BTreeMap::from([
        (
            "base_model.model.q_proj.lora_A.weight".into(),
            randn(1, (2, 6), DType::F32),
        ),
        (
            "base_model.model.q_proj.lora_B.weight".into(),
            randn(2, (4, 2), DType::F32),
        ),
    ])
}

/// The least that PEFT's configuration must say, with more fields or others.
pub fn config(fields: Value) -> Value {
    let mut config = serde_json::json!({"peft_type": "LORA", "r": 2});
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Writes a folder with the safetensors crate.
pub fn put(dir: &Path, config: &Value, tensors: &BTreeMap<String, Tensor>) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(CONFIG), config.to_string()).unwrap();
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(dir.join(WEIGHTS), bytes).unwrap();
}

/// Reads a folder that `put` writes.
pub fn read(config: &Value, tensors: &BTreeMap<String, Tensor>) -> Result<AdapterWeights, Error> {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), config, tensors);
    AdapterWeights::read(dir.path())
}

/// The text of the error that reading must give.
pub fn refusal(config: &Value, tensors: &BTreeMap<String, Tensor>) -> String {
    match read(config, tensors) {
        Ok(_) => panic!("{config} was read"),
        Err(error) => error.to_string(),
    }
}

/// Asserts that a text holds all parts.
#[track_caller]
pub fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text}\nlacks\n{part}");
    }
}

/// Asserts that both are the same adapter, number by number.
#[track_caller]
pub fn assert_same(one: &AdapterWeights, other: &AdapterWeights) {
    assert_eq!(
        one.layers.keys().collect::<Vec<_>>(),
        other.layers.keys().collect::<Vec<_>>()
    );
    for (path, layer) in &one.layers {
        let twin = &other.layers[path];
        assert_eq!(bits(&layer.a), bits(&twin.a), "{path}");
        assert_eq!(bits(&layer.b), bits(&twin.b), "{path}");
        assert_eq!(
            layer.bias.as_ref().map(bits),
            twin.bias.as_ref().map(bits),
            "{path}"
        );
        assert_eq!(layer.scaling(), twin.scaling(), "{path}");
    }
    let saved = |adapter: &AdapterWeights| -> Vec<_> {
        adapter
            .saved
            .iter()
            .map(|(name, tensor)| (name.clone(), bits(tensor)))
            .collect()
    };
    assert_eq!(saved(one), saved(other));
    assert_eq!(one.dropout, other.dropout);
    assert_eq!(one.bias, other.bias);
    assert_eq!(one.modules_to_save, other.modules_to_save);
    assert_eq!(one.origin, other.origin);
}

/// Type, shape and numbers of a tensor.
pub fn bits(tensor: &Tensor) -> (DType, Vec<usize>, Vec<u64>) {
    let values = lora_tests::to_vec(tensor)
        .into_iter()
        .map(f64::to_bits)
        .collect();
    (tensor.dtype(), tensor.dims().to_vec(), values)
}

/// Asserts that both add the same to the weights, up to rounding in f32.
#[track_caller]
pub fn assert_acts_alike(one: &AdapterWeights, other: &AdapterWeights) {
    assert_eq!(
        one.layers.keys().collect::<Vec<_>>(),
        other.layers.keys().collect::<Vec<_>>()
    );
    for (path, layer) in &one.layers {
        let error = relative_error(
            &other.layers[path].delta().unwrap(),
            &layer.delta().unwrap(),
        );
        assert!(error < 1e-6, "{path}: {error}");
    }
}
