//! Whole models with adapters that the released PEFT saved: logits, loss and every gradient.

use std::{fs, path::PathBuf, sync::Arc};

use candle_core::{DType, Device, Tensor};
use lora_core::{LoraTargets, nn::causal_lm_loss};
use lora_examples::{hf_folder::HfFolder, model::CausalLm, weights::var_builder};
use lora_tests::relative_error;

fn load(folder: &str) -> (PathBuf, CausalLm) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden/llama")
        .join(folder);
    let config = HfFolder::read_config(&folder).unwrap();
    let weights = Arc::new(HfFolder::open(&folder).unwrap());
    let vb = var_builder(weights, DType::F32, &Device::Cpu);
    let model = CausalLm::new(&config, vb).unwrap();
    (folder, model)
}

/// The adapters of a model's folder.
fn adapters(folder: &str) -> Vec<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden/llama")
        .join(folder);
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = folders
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Logits `[batch, tokens, vocab]` of `ids` `[batch, tokens]`, packed.
fn logits(model: &CausalLm, ids: &Tensor) -> Tensor {
    let (batch, tokens) = ids.dims2().unwrap();
    let ids = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
    let hidden = model.hidden_states(&ids, &vec![tokens; batch]).unwrap();
    model
        .logits(&hidden)
        .unwrap()
        .reshape((batch, tokens, ()))
        .unwrap()
}

#[test]
fn logits_loss_and_gradients_equal_pefts() {
    let mut checked = 0;
    for folder in ["tied", "untied", "qwen2", "mistral"] {
        for adapter in adapters(folder) {
            let (path, mut model) = load(folder);
            let path = path.join(&adapter);
            let expected = path.join("expected.safetensors");
            let expected = candle_core::safetensors::load(expected, &Device::Cpu).unwrap();
            let close = |name: &str, got: &Tensor, bound: f64| {
                let error = relative_error(got, &expected[name]);
                assert!(error < bound, "{name} of {folder}/{adapter}: {error}");
            };
            let ids = &expected["input_ids"];
            close("base_logits", &logits(&model, ids), 1e-5);
            model.load_adapter(&path).unwrap();
            close("logits", &logits(&model, ids), 1e-5);

            let (batch, tokens) = ids.dims2().unwrap();
            let flat = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
            let hidden = model.hidden_states(&flat, &vec![tokens; batch]).unwrap();
            let labels: Vec<i64> = expected["labels"].flatten_all().unwrap().to_vec1().unwrap();
            let lengths = vec![tokens; batch];
            let loss = causal_lm_loss(&hidden, |xs| model.logits(xs), &labels, &lengths, -100);
            let loss = loss.unwrap();
            close("loss", &loss.reshape(1).unwrap(), 1e-5);
            let grads = loss.backward().unwrap();
            model.check_gradients(&grads).unwrap();
            let vars = model.named_lora_vars().unwrap();
            assert_eq!(
                vars.len(),
                expected
                    .keys()
                    .filter(|key| key.starts_with("grad."))
                    .count()
            );
            for (name, var) in vars {
                close(&format!("grad.{name}"), grads.get(&var).unwrap(), 2e-5);
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 8);
}

#[test]
fn an_adapter_of_pefts_saves_to_the_same_tensors() {
    let out = tempfile::tempdir().unwrap();
    for (folder, adapter) in [("tied", "seven"), ("tied", "patterns"), ("untied", "qv")] {
        let (path, mut model) = load(folder);
        model.load_adapter(path.join(adapter)).unwrap();
        model.save_adapter(out.path()).unwrap();
        let tensors = |dir: &std::path::Path| {
            candle_core::safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu)
                .unwrap()
        };
        let (want, got) = (tensors(&path.join(adapter)), tensors(out.path()));
        assert_eq!(got.len(), want.len());
        for (name, want) in want {
            assert_eq!(relative_error(&got[&name], &want), 0.0, "{name}");
        }
        let (_, mut again) = load(folder);
        let report = again.load_adapter(out.path()).unwrap();
        assert_eq!(report, model.lora_report().unwrap());
    }
}
