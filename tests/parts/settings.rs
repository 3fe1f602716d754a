//! Every setting of PEFT's, merged as PEFT merges it.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{Device, Tensor};
use lora_core::{MergedAdapters, adapter::AdapterWeights};
use lora_tests::{relative_error, to_vec};

use crate::golden;

fn tensors(file: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

#[test]
fn merged_weights_are_pefts() {
    let mut checked = 0;
    for (model, base) in [
        ("encoder", "settings/encoder"),
        ("classifier", "settings/classifier"),
        ("qwen2", "llama/qwen2"),
        ("untied", "llama/untied"),
    ] {
        let base = tensors(&golden(base).join("model.safetensors"));
        let entries = fs::read_dir(golden("settings").join(model)).unwrap();
        let folders = entries.map(|entry| entry.unwrap().path());
        for folder in folders.filter(|path| path.join("expected.safetensors").exists()) {
            let adapter = AdapterWeights::read(&folder).unwrap();
            let expected = tensors(&folder.join("expected.safetensors"));
            let expected = |name: &str| expected.get(&format!("merged.{name}"));
            let merged = MergedAdapters::new([(adapter.clone(), 1.0)]).unwrap();
            for (name, tensor) in &base {
                let got = merged.merge(name, tensor).unwrap();
                match (got, expected(name), adapter.saved.get(name)) {
                    // `bias` and `lora_bias` may meet in a tensor: `expected` has both.
                    (Some(got), Some(expected), _) => {
                        let error = relative_error(&got, expected);
                        assert!(error < 1e-6, "{name} of {}: {error}", folder.display());
                        checked += 1;
                    }
                    (Some(got), None, Some(saved)) => assert_eq!(to_vec(&got), to_vec(saved)),
                    (None, None, None) => {}
                    (got, ..) => panic!("{name} of {}: {:?}", folder.display(), got.is_some()),
                }
            }
            merged.finish().unwrap();
        }
    }
    assert!(checked >= 148, "{checked}");
}
