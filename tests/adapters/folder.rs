//! Adapters from folders and into them, by name.

use std::fs;

use candle_core::{DType, Module};
use lora_core::{
    BiasMode, LoraTargets, PeftConfig,
    adapter::{AdapterWeights, Profile},
};
use lora_tests::to_vec;

use crate::model::{Model, ids, message};

/// Everything that an adapter can have.
fn everything() -> PeftConfig {
    PeftConfig::new(["q_proj"])
        .dim(2)
        .lora_bias(true)
        .use_rslora(true)
        .bias(BiasMode::All)
        .modules_to_save(["head", "embed"])
}

#[test]
fn what_is_saved_under_one_name_loads_under_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::with_three(DType::F32);
    model.add("all", &everything());
    for name in ["a", "b", "all"] {
        model.save_adapter_as(name, dir.path().join(name)).unwrap();
        let want = to_vec(&model.sum_of(&[name], &ids(2)));
        let mut other = Model::new(DType::F32);
        other.load_adapter_as("x", dir.path().join(name)).unwrap();
        assert!(other.adapters().unwrap().active().is_empty());
        assert_eq!(to_vec(&other.sum_of(&["x"], &ids(2))), want, "{name}");
        other.save_adapter(dir.path().join("again")).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |folder: &str| fs::read(dir.path().join(folder).join(file)).unwrap();
            assert_eq!(read(name), read("again"), "{name}/{file}");
        }
    }
}

#[test]
fn without_a_name_the_default_or_the_only_one_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::with_three(DType::F32);
    let error = message(model.save_adapter(dir.path()));
    assert!(error.contains("which of `a`, `b`, `c`") && error.contains("save_adapter_as"));
    model.rename_adapter("b", "default").unwrap();
    model.save_adapter(dir.path()).unwrap();
    assert_eq!(AdapterWeights::read(dir.path()).unwrap().layers.len(), 4);
    for name in ["default", "c"] {
        model.delete_adapter(name).unwrap();
    }
    model.save_adapter(dir.path()).unwrap();
    assert_eq!(AdapterWeights::read(dir.path()).unwrap().layers.len(), 2);

    // Loading is as `default`, and active.
    let report = model.load_adapter(dir.path()).unwrap();
    assert_eq!(report.sites.len(), 2);
    assert_eq!(model.adapters().unwrap().names(), ["a", "default"]);
    assert_eq!(model.adapters().unwrap().active(), ["default"]);
    assert!(message(model.load_adapter_as("a", dir.path())).contains("is there already"));
}

#[test]
fn an_adapter_of_another_base_is_refused_unless_that_is_meant() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::with_three(DType::F32);
    model.save_adapter_as("b", dir.path()).unwrap();
    let mut other = Model::new(DType::F32);
    other.layers[1].up_proj = Model::new(DType::F32).layers[0].up_proj.clone();
    let before = other.snapshot();
    let error = message(other.load_adapter_as("b", dir.path()));
    assert!(error.contains("another base"), "{error}");
    assert_eq!(other.snapshot(), before);
    let mut weights = AdapterWeights::read(dir.path()).unwrap();
    assert!(message(other.import_adapter("b", &weights)).contains("another base"));
    weights.origin.fingerprint = None;
    other.import_adapter("b", &weights).unwrap();
    // The same base in another type is the same base.
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        Model::new(dtype).load_adapter(dir.path()).unwrap();
    }
}

#[test]
fn a_target_without_tensors_is_noted_and_a_tensor_without_a_layer_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::with_three(DType::F32);
    model.save_adapter_as("a", dir.path()).unwrap();
    let file = dir.path().join("adapter_config.json");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let mut more = config.clone();
    more["target_modules"] = serde_json::json!(["q_proj", "o_proj"]);
    fs::write(&file, more.to_string()).unwrap();
    let report = Model::new(DType::F32).load_adapter(dir.path()).unwrap();
    assert!(
        report.notes.iter().any(|note| note.contains("`o_proj`")),
        "{:?}",
        report.notes
    );
    assert!(report.to_string().contains("note: "));

    let mut weights = model.export_adapter("a").unwrap();
    let layer = weights.layers["layers.0.q_proj"].clone();
    weights.layers.insert("layers.7.q_proj".into(), layer);
    weights.write(dir.path(), Profile::Peft).unwrap();
    let error = message(Model::new(DType::F32).load_adapter(dir.path()));
    assert!(error.contains("matches `layers.7.q_proj`"), "{error}");
}

#[test]
fn named_folders_load_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::with_three(DType::F32);
    for name in ["a", "b", "c"] {
        model.save_adapter_as(name, dir.path().join(name)).unwrap();
    }
    let want = to_vec(&model.sum_of(&["c", "a"], &ids(2)));
    let mut other = Model::new(DType::F32);
    for (name, weights) in AdapterWeights::read_named(dir.path()).unwrap() {
        other.import_adapter(&name, &weights).unwrap();
    }
    assert_eq!(to_vec(&other.sum_of(&["c", "a"], &ids(2))), want);
}

#[test]
fn a_type_of_numbers_survives_the_way_through_a_model() {
    let dir = tempfile::tempdir().unwrap();
    for (base, numbers) in [(DType::F32, DType::BF16), (DType::BF16, DType::F32)] {
        let mut model = Model::new(base);
        model.add("a", &PeftConfig::new(["q_proj"]).lora_dtype(numbers));
        model.save_adapter(dir.path()).unwrap();
        let mut other = Model::new(base);
        other.load_adapter(dir.path()).unwrap();
        let vars = other.lora_vars().unwrap();
        assert!(vars.iter().all(|var| var.dtype() == numbers));
        let want = model.sum_of(&["a"], &ids(2));
        assert_eq!(to_vec(&other.forward(&ids(2)).unwrap()), to_vec(&want));
    }
}
