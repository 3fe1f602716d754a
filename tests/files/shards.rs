//! Adapters in several files.

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::adapter::AdapterWeights;
use serde_json::{Value, json};

use crate::support::*;

const INDEX: &str = "adapter_model.safetensors.index.json";
const A: &str = "base_model.model.q_proj.lora_A.weight";
const B: &str = "base_model.model.q_proj.lora_B.weight";

/// Two files of one tensor each, and their index.
fn shards(dir: &Path) {
    put(dir, &config(json!({})), &q_proj());
    fs::remove_file(dir.join(WEIGHTS)).unwrap();
    for (file, key) in [("one.safetensors", A), ("two.safetensors", B)] {
        let tensor = BTreeMap::from([(key.to_string(), q_proj()[key].clone())]);
        fs::write(
            dir.join(file),
            safetensors::serialize(&tensor, None).unwrap(),
        )
        .unwrap();
    }
    index(dir, json!({A: "one.safetensors", B: "two.safetensors"}));
}

fn index(dir: &Path, map: Value) {
    fs::write(
        dir.join(INDEX),
        json!({"metadata": {"total_size": 80}, "weight_map": map}).to_string(),
    )
    .unwrap();
}

#[test]
fn the_files_of_an_index_make_one_adapter() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path());
    let adapter = AdapterWeights::read(dir.path()).unwrap();
    assert_same(&adapter, &read(&config(json!({})), &q_proj()).unwrap());
}

#[test]
fn an_index_that_disagrees_with_its_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path());
    for (map, parts) in [
        (
            json!({A: "one.safetensors", B: "../two.safetensors"}),
            vec!["../two.safetensors", "no file of this folder"],
        ),
        (
            json!({A: "one.safetensors", B: "/etc/passwd"}),
            vec!["/etc/passwd"],
        ),
        (json!({A: "one.safetensors", B: ".."}), vec!["\"..\""]),
        (json!({A: "one.safetensors", B: ""}), vec!["\"\""]),
        (
            json!({A: "one.safetensors", B: "three.safetensors"}),
            vec!["three.safetensors"],
        ),
        (
            json!({A: "one.safetensors", B: "one.safetensors"}),
            vec![B, "missing from one.safetensors"],
        ),
        (
            json!({A: "one.safetensors", "x": "two.safetensors"}),
            vec!["`x` is missing from two", "is not in the index"],
        ),
        (json!({A: "one.safetensors", B: 2}), vec![B, "no text"]),
        (json!({}), vec!["empty"]),
        (json!([]), vec!["no object"]),
    ] {
        index(dir.path(), map);
        let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
        assert_says(&error, &parts);
    }
    fs::write(dir.path().join(INDEX), "{}").unwrap();
    assert_says(
        &AdapterWeights::read(dir.path()).unwrap_err().to_string(),
        &["weight_map"],
    );
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path());
    fs::write(
        dir.path().join("two.safetensors"),
        safetensors::serialize(q_proj(), None).unwrap(),
    )
    .unwrap();
    let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
    assert_says(&error, &[A, "as well"]);
    let twice =
        format!(r#"{{"weight_map": {{"{A}": "one.safetensors", "{A}": "two.safetensors"}}}}"#);
    fs::write(dir.path().join(INDEX), twice).unwrap();
    assert_says(
        &AdapterWeights::read(dir.path()).unwrap_err().to_string(),
        &["twice"],
    );
}
