//! The golden files, and the two model families behind one type.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_examples::any_model::AnyModel;
use lora_tests::{relative_error, to_vec};
use serde_json::Value;

pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

pub fn json(file: &str) -> Value {
    serde_json::from_slice(&fs::read(golden(file)).unwrap()).unwrap()
}

pub fn tensors(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(file), &Device::Cpu).unwrap()
}

/// The sub-folders of a golden folder, by name.
pub fn folders(name: &str) -> Vec<String> {
    let entries = fs::read_dir(golden(name)).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = folders
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A base model: `encoder` and `classifier` are BERTs, the others are in `golden/llama`.
pub fn open(name: &str) -> AnyModel {
    let family = match name {
        "encoder" | "classifier" => "settings",
        _ => "llama",
    };
    let folder = golden(family).join(name);
    AnyModel::open(&folder, DType::F32, &Device::Cpu).unwrap()
}

/// One adapter of `golden/settings`.
pub struct Case {
    pub name: String,
    pub base: String,
    pub expected: HashMap<String, Tensor>,
    /// What PEFT was given and what it adapted.
    pub case: Value,
}

impl Case {
    pub fn all() -> Vec<Self> {
        let cases: Vec<_> = folders("settings")
            .into_iter()
            .flat_map(|base| {
                let adapters = folders(&format!("settings/{base}"));
                adapters.into_iter().map(move |adapter| {
                    let name = format!("settings/{base}/{adapter}");
                    Self {
                        base: base.clone(),
                        expected: tensors(&format!("{name}/expected.safetensors")),
                        case: json(&format!("{name}/case.json")),
                        name,
                    }
                })
            })
            .collect();
        assert_eq!(cases.len(), 27);
        cases
    }

    pub fn dir(&self) -> PathBuf {
        golden(&self.name)
    }

    pub fn forward(&self, model: &AnyModel) -> Tensor {
        let expected = &self.expected;
        let (ids, mask) = (&expected["input_ids"], expected.get("attention_mask"));
        model.forward(ids, mask).unwrap()
    }

    /// `got` is the tensor `name` within `bound`.
    pub fn assert_close(&self, name: &str, got: &Tensor, bound: f64) {
        let want = self.expected.get(name);
        let want = want.unwrap_or_else(|| panic!("{}: no {name}", self.name));
        assert_close(&format!("{name} of {}", self.name), got, want, bound);
    }
}

/// `‖got − want‖` is below `bound`, relative to `‖want‖` where that is above 1. (The gradient of a
/// key's bias is zero but for rounding: it moves all scores alike.)
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, bound: f64) {
    let size = to_vec(want).iter().map(|v| v * v).sum::<f64>().sqrt();
    let relative = if size > 0.0 && size < 1.0 { size } else { 1.0 };
    let error = relative_error(got, want) * relative;
    assert!(error < bound, "{what}: {error}");
}
