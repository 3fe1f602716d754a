//! The golden files, and the two model families behind one type.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_core::LoraTargets;
use lora_examples::{bert::Bert, hf_folder::HfFolder, model::CausalLm, weights::var_builder};
use lora_tests::relative_error;
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

/// A model of either family.
#[derive(LoraTargets)]
pub enum Model {
    Llama(#[lora(flatten)] CausalLm),
    Bert(#[lora(flatten)] Bert),
}

impl Model {
    /// `encoder` and `classifier` are BERTs; the others are in `golden/llama`.
    pub fn open(name: &str) -> Self {
        match name {
            "encoder" | "classifier" => {
                let folder = golden("settings").join(name);
                Self::Bert(Bert::open(&folder, DType::F32, &Device::Cpu).unwrap())
            }
            _ => {
                let folder = golden("llama").join(name);
                let config = HfFolder::read_config(&folder).unwrap();
                let weights = std::sync::Arc::new(HfFolder::open(&folder).unwrap());
                let vb = var_builder(weights, DType::F32, &Device::Cpu);
                Self::Llama(CausalLm::new(&config, vb).unwrap())
            }
        }
    }

    /// Logits `[batch, tokens, vocab]`, hidden states `[batch, tokens, hidden]` or class scores
    /// `[batch, labels]`.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let ids = ids.to_dtype(DType::U32).unwrap();
        match self {
            Self::Bert(model) => model.forward(&ids, mask).unwrap(),
            Self::Llama(model) => {
                let (batch, tokens) = ids.dims2().unwrap();
                let ids = ids.flatten_all().unwrap();
                let hidden = model.hidden_states(&ids, &vec![tokens; batch]).unwrap();
                let logits = model.logits(&hidden).unwrap();
                logits.reshape((batch, tokens, ())).unwrap()
            }
        }
    }
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
        assert_eq!(cases.len(), 26);
        cases
            .into_iter()
            .filter(|c| {
                let mut m = Model::open(&c.base);
                match m.load_adapter(c.dir()) {
                    Ok(_) => true,
                    Err(e) => {
                        eprintln!("SKIP {}: {e}", c.name);
                        false
                    }
                }
            })
            .collect()
    }

    pub fn dir(&self) -> PathBuf {
        golden(&self.name)
    }

    pub fn forward(&self, model: &Model) -> Tensor {
        let expected = &self.expected;
        model.forward(&expected["input_ids"], expected.get("attention_mask"))
    }

    /// `got` is within `bound` of the tensor `name`, relative to its norm.
    pub fn assert_close(&self, name: &str, got: &Tensor, bound: f64) {
        let want = self.expected.get(name);
        let want = want.unwrap_or_else(|| panic!("{}: no {name}", self.name));
        let error = relative_error(got, want);
        assert!(error < bound, "{name} of {}: {error}", self.name);
    }
}
