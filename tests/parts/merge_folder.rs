//! A base model's folder with adapters merged in: bytes, files, and what is refused.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use lora_core::{MergedAdapters, adapter::AdapterWeights};
use lora_examples::{
    hf_folder::HfFolder,
    merge_folder::merge_folder,
    model::CausalLm,
    weights::{Weights, var_builder},
};
use lora_tests::{randn, relative_error, to_vec};

use crate::{
    golden,
    merged::{adapter, layer},
};

const BASE: &str = "llama/untied";

fn qv() -> MergedAdapters {
    let adapter = AdapterWeights::read(golden("llama/untied/qv")).unwrap();
    MergedAdapters::new([(adapter, 1.0)]).unwrap()
}

/// The logits `[batch, tokens, vocab]` of the model in a folder.
fn logits(folder: &Path, ids: &Tensor) -> Tensor {
    let config = HfFolder::read_config(folder).unwrap();
    let weights = std::sync::Arc::new(HfFolder::open(folder).unwrap());
    let model = CausalLm::new(&config, var_builder(weights, DType::F32, &Device::Cpu)).unwrap();
    let (batch, tokens) = ids.dims2().unwrap();
    let ids = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
    let hidden = model.hidden_states(&ids, &vec![tokens; batch]).unwrap();
    let logits = model.logits(&hidden).unwrap();
    logits.reshape((batch, tokens, ())).unwrap()
}

/// A copy of the base folder in `shards` files, with more files beside them.
fn sharded_base(dir: &Path, shards: usize) {
    fs::create_dir(dir).unwrap();
    let base = golden(BASE);
    fs::copy(base.join("config.json"), dir.join("config.json")).unwrap();
    let tensors =
        candle_core::safetensors::load(base.join("model.safetensors"), &Device::Cpu).unwrap();
    let tensors: BTreeMap<_, _> = tensors.into_iter().collect();
    let (mut map, names) = (serde_json::Map::new(), tensors.keys().collect::<Vec<_>>());
    for (i, names) in names.chunks(names.len().div_ceil(shards)).enumerate() {
        let file = format!("model-0000{}-of-0000{shards}.safetensors", i + 1);
        let shard = names.iter().map(|name| (name.as_str(), &tensors[*name]));
        safetensors::serialize_to_file(shard, None, &dir.join(&file)).unwrap();
        map.extend(
            names
                .iter()
                .map(|name| (name.to_string(), file.clone().into())),
        );
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    for file in [
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
    ] {
        fs::write(dir.join(file), file).unwrap();
    }
    fs::create_dir(dir.join("onnx")).unwrap();
}

#[test]
fn a_merged_folder_is_the_model_with_pefts_adapter() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("merged");
    let folder = merge_folder(&golden(BASE), &qv(), &out).unwrap();
    assert_eq!(folder.weights, [("model.safetensors".to_string(), 4)]);
    let expected = golden("llama/untied/qv/expected.safetensors");
    let expected = candle_core::safetensors::load(expected, &Device::Cpu).unwrap();
    let got = logits(&out, &expected["input_ids"]);
    assert!(relative_error(&got, &expected["logits"]) < 1e-5);
    assert!(relative_error(&got, &expected["base_logits"]) > 1e-3);
}

#[test]
fn shards_stay_as_they_are_but_for_the_merged_tensors() {
    let temp = tempfile::tempdir().unwrap();
    let (base, out) = (temp.path().join("base"), temp.path().join("out"));
    sharded_base(&base, 3);
    let folder = merge_folder(&base, &qv(), &out).unwrap();
    assert_eq!(
        folder.copied,
        [
            "LICENSE",
            "chat_template.jinja",
            "config.json",
            "merges.txt",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
        ]
    );
    assert_eq!(
        folder.left_out,
        [
            "consolidated.safetensors",
            "onnx",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ]
    );
    assert_eq!(
        folder
            .weights
            .iter()
            .map(|(_, changed)| changed)
            .sum::<usize>(),
        4
    );

    let merged = qv();
    let (old, new) = (
        HfFolder::open(&base).unwrap(),
        HfFolder::open(&out).unwrap(),
    );
    assert_eq!(old.names(), new.names());
    for name in old.names() {
        let (old, new) = (old.load(&name).unwrap(), new.load(&name).unwrap());
        let expected = merged.merge(&name, &old).unwrap().unwrap_or(old);
        assert_eq!(to_vec(&new), to_vec(&expected), "{name}");
    }
    for (file, _) in &folder.weights {
        let header = |dir: &Path| {
            let bytes = fs::read(dir.join(file)).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[..8 + length].to_vec()
        };
        assert_eq!(header(&base), header(&out), "{file}");
    }
    // The same again gives the same bytes.
    let again = temp.path().join("again");
    merge_folder(&base, &qv(), &again).unwrap();
    for (file, _) in &folder.weights {
        assert_eq!(
            fs::read(out.join(file)).unwrap(),
            fs::read(again.join(file)).unwrap()
        );
    }
}

#[test]
fn what_finds_no_place_leaves_no_folder() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    let elsewhere = adapter([
        ("model.layers.0.self_attn.q_proj", layer(1, 24, 24)),
        ("model.layers.7.self_attn.q_proj", layer(1, 24, 24)),
    ]);
    let merged = MergedAdapters::new([(elsewhere, 1.0)]).unwrap();
    let error = merge_folder(&golden(BASE), &merged, &out)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "not merged: `model.layers.7.self_attn.q_proj.weight`: the model has no such tensor"
    );
    let crooked = adapter([("model.layers.1.mlp.up_proj", layer(1, 24, 24))]);
    let merged = MergedAdapters::new([(crooked, 1.0)]).unwrap();
    let error = merge_folder(&golden(BASE), &merged, &out)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`model.layers.1.mlp.up_proj.weight` is [40, 24] in the model"),
        "{error}"
    );

    // A base that breaks off.
    let base = temp.path().join("base");
    sharded_base(&base, 2);
    let shard = base.join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    let error = merge_folder(&base, &qv(), &out).unwrap_err().to_string();
    assert!(
        error.contains("model-00002-of-00002.safetensors"),
        "{error}"
    );
    // A shard somewhere else.
    let index = fs::read_to_string(base.join("model.safetensors.index.json")).unwrap();
    fs::write(temp.path().join("model-00002-of-00002.safetensors"), bytes).unwrap();
    let index = index.replace("model-00002", "../model-00002");
    fs::write(base.join("model.safetensors.index.json"), index).unwrap();
    let error = merge_folder(&base, &qv(), &out).unwrap_err().to_string();
    assert!(error.contains("is not in"), "{error}");

    let left: Vec<_> = fs::read_dir(temp.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(!out.exists() && left.len() == 2, "{left:?}");
}

#[test]
fn a_folder_with_something_in_it_is_not_written_to() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("mine"), "").unwrap();
    let error = merge_folder(&golden(BASE), &qv(), temp.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("is not empty; name a folder that is not there yet"),
        "{error}"
    );
    // What a killed run left is in nobody's way.
    let out = temp.path().join("out");
    fs::create_dir_all(temp.path().join("out.lora-merge/half")).unwrap();
    fs::create_dir(&out).unwrap();
    merge_folder(&golden(BASE), &qv(), &out).unwrap();
    assert!(out.join("config.json").exists() && !temp.path().join("out.lora-merge").exists());
}

#[test]
fn an_adapter_of_a_tied_head_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let mut whole = AdapterWeights::default();
    whole
        .saved
        .insert("lm_head.weight".into(), randn(1, (61, 24), DType::F32));
    let merged = MergedAdapters::new([(whole, 1.0)]).unwrap();
    let error = merge_folder(&golden("llama/tied"), &merged, &temp.path().join("out"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("config.json: `tie_word_embeddings` is true"),
        "{error}"
    );
    // Untied, it takes its place.
    merge_folder(&golden(BASE), &merged, &temp.path().join("out")).unwrap();
}
