//! Against what the released PEFT computes; see `tests/golden/README.md`.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Module, Tensor, Var};
use lora_core::{LinearLoRA, PeftConfig, philox};
use lora_tests::{relative_error, to_vec};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

/// The layer of a golden file.
fn layer(tensors: &HashMap<String, Tensor>) -> LinearLoRA {
    let (a, b) = (&tensors["A"], &tensors["B"]);
    let rank = a.dims()[0];
    let scaling = to_vec(&tensors["scaling"])[0];
    let config = PeftConfig::all_linear()
        .dim(rank)
        .alpha(scaling * rank as f64)
        .lora_dtype(a.dtype())
        .adapter()
        .unwrap();
    let (weight, bias) = (tensors["W"].clone(), tensors.get("b").cloned());
    let layer = LinearLoRA::new("golden", weight, bias, &config).unwrap();
    layer.lora_a().set(a).unwrap();
    layer.lora_b().set(b).unwrap();
    layer
}

#[test]
fn forward_backward_and_merge_equal_pefts() {
    let mut files: Vec<_> = fs::read_dir(golden("linear"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 17);
    for file in files {
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let bound = match tensors["W"].dtype() {
            DType::F64 => 1e-14,
            DType::F32 => 1e-6,
            DType::F16 => 1e-3,
            _ => 8e-3,
        };
        let layer = layer(&tensors);
        let xs = Var::from_tensor(&tensors["x"]).unwrap();
        let ys = layer.forward(&xs).unwrap();
        let loss = ys.mul(&tensors["dY"]).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let got = [
            ("y", ys),
            ("dx", grads.get(&xs).unwrap().clone()),
            ("dA", grads.get(layer.lora_a()).unwrap().clone()),
            ("dB", grads.get(layer.lora_b()).unwrap().clone()),
            ("W_merged", layer.merged_weight().unwrap()),
        ];
        for (name, got) in got {
            let error = relative_error(&got, &tensors[name]);
            assert!(error <= bound, "{name} of {}: {error}", file.display());
            assert_eq!(
                got.dtype(),
                tensors[name].dtype(),
                "{name} of {}",
                file.display()
            );
        }
    }
}

#[test]
fn philox_gives_the_known_answers() {
    let text = fs::read_to_string(golden("philox.json")).unwrap();
    let known: Value = serde_json::from_str(&text).unwrap();
    let vectors = known["vectors"].as_array().unwrap();
    assert!(vectors.len() >= 38);
    for vector in vectors {
        let words = |key: &str| -> Vec<u32> {
            let words = vector[key].as_array().unwrap();
            words
                .iter()
                .map(|word| word.as_u64().unwrap() as u32)
                .collect()
        };
        let counter = words("counter").try_into().unwrap();
        let key = words("key").try_into().unwrap();
        let got = match vector["rounds"].as_u64() {
            Some(7) => philox::<7>(counter, key),
            Some(10) => philox::<10>(counter, key),
            other => panic!("{other:?} rounds"),
        };
        assert_eq!(got.as_slice(), words("output"));
    }
}
