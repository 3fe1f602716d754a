//! Other numbers in the place of an adapter's.

use candle_core::{DType, Module, Var};
use lora_core::{LoraTargets, PeftConfig, adapter::AdapterWeights};
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

/// An adapter made by another model, and what that computes with it.
fn made(config: &PeftConfig) -> (AdapterWeights, Vec<f64>) {
    let mut model = Model::new(DType::F32);
    model.add("other", config);
    let ys = to_vec(&model.sum_of(&["other"], &ids(2)));
    (model.export_adapter("other").unwrap(), ys)
}

/// A model with a running adapter of rank 4 on all linear layers, and its variables.
fn running() -> (Model, Vec<Var>) {
    let mut model = Model::new(DType::F32);
    model.add("live", &PeftConfig::all_linear().dim(4).alpha(9.0));
    model.set_adapter("live").unwrap();
    let vars = model.adapter_vars("live").unwrap();
    (model, vars)
}

#[test]
fn imported_weights_compute_what_they_did() {
    for config in [
        PeftConfig::all_linear().dim(4).alpha(3.0),
        PeftConfig::new(["q_proj", "head"]).dim(3).use_rslora(true),
        PeftConfig::new(["layers.1.*"]).dim(2).lora_bias(true),
    ] {
        let (weights, want) = made(&config);
        let mut model = Model::new(DType::F32);
        let report = model.import_adapter("mine", &weights).unwrap();
        assert_eq!(report.sites.len(), weights.layers.len());
        assert_eq!(to_vec(&model.sum_of(&["mine"], &ids(2))), want);
        assert!(!model.layers[1].q_proj.lora().unwrap().is_training());
        // A copy: it does not follow what happens to the model.
        let exported = model.export_adapter("mine").unwrap();
        let before = to_vec(&exported.layers["layers.1.q_proj"].b);
        model.fill("mine");
        assert_eq!(to_vec(&exported.layers["layers.1.q_proj"].b), before);
        model.swap_adapter("mine", &exported).unwrap();
        assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), want);
    }
}

#[test]
fn a_swap_of_any_lower_rank_alpha_or_rule_needs_no_new_tensor() {
    let (mut model, vars) = running();
    for config in [
        PeftConfig::all_linear().dim(4).alpha(3.0),
        PeftConfig::all_linear().dim(2).alpha(32.0),
        PeftConfig::all_linear().dim(1).use_rslora(true),
        PeftConfig::all_linear().dim(3).alpha(7.0).use_rslora(true),
    ] {
        let (weights, want) = made(&config);
        model.swap_adapter("live", &weights).unwrap();
        let error = relative_error(
            &model.forward(&ids(2)).unwrap().flatten_all().unwrap(),
            &candle_core::Tensor::new(want, &candle_core::Device::Cpu).unwrap(),
        );
        assert!(error < 1e-6, "{error}");
        let now = model.adapter_vars("live").unwrap();
        assert!(vars.iter().zip(&now).all(|(old, new)| old.id() == new.id()));
        let exported = model.export_adapter("live").unwrap();
        for (path, layer) in &weights.layers {
            let out = &exported.layers[path];
            assert_eq!(to_vec(&out.a), to_vec(&layer.a), "{path}");
            assert_eq!(to_vec(&out.b), to_vec(&layer.b), "{path}");
            assert_eq!(out.scaling(), layer.scaling(), "{path}");
        }
    }
}

#[test]
fn layers_that_a_swap_leaves_out_are_left_alone() {
    let (mut model, vars) = running();
    let (few, want) = made(&PeftConfig::new(["layers.0.up_proj"]).dim(2));
    model.swap_adapter("live", &few).unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), want);
    assert_eq!(model.adapter_status().unwrap()[0].sites, 1);
    assert_eq!(model.export_adapter("live").unwrap().layers.len(), 1);
    let loss = model.forward(&ids(2)).unwrap().sum_all().unwrap();
    model.check_gradients(&loss.backward().unwrap()).unwrap();
    model.merge().unwrap();
    model.unmerge().unwrap();

    // The room is still there.
    let (all, want) = made(&PeftConfig::all_linear().dim(4));
    model.swap_adapter("live", &all).unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), want);
    let now = model.adapter_vars("live").unwrap();
    assert!(vars.iter().zip(&now).all(|(old, new)| old.id() == new.id()));
}

#[test]
fn what_has_no_room_is_refused_and_named() {
    let (mut model, _) = running();
    let before = model.snapshot();
    let mut misshaped = made(&PeftConfig::all_linear().dim(2)).0;
    let layer = misshaped.layers.get_mut("layers.0.up_proj").unwrap();
    layer.b = layer.b.narrow(0, 0, 5).unwrap();
    for (weights, text) in [
        (
            made(&PeftConfig::all_linear().dim(5)).0,
            "`layers.0.q_proj` has rank 5",
        ),
        (
            made(&PeftConfig::new(["*"]).dim(2)).0,
            "`head` is not in the adapter in place",
        ),
        (
            made(&PeftConfig::all_linear().dim(2).lora_bias(true)).0,
            "`layers.1.up_proj` has a lora_bias",
        ),
        (
            misshaped,
            "`layers.0.up_proj.lora_B.weight` has shape [5, 2]",
        ),
    ] {
        let error = message(model.swap_adapter("live", &weights));
        assert!(
            error.starts_with("adapter `live`: ") && error.contains(text),
            "{error}"
        );
        assert_eq!(model.snapshot(), before);
    }
}

#[test]
fn what_does_not_fit_the_model_is_not_imported() {
    let mut model = Model::new(DType::F32);
    let before = model.snapshot();
    let mut weights = made(&PeftConfig::all_linear().dim(2)).0;
    let layer = weights.layers.remove("layers.0.up_proj").unwrap();
    weights.layers.insert("layers.0.up_porj".into(), layer);
    let layer = weights.layers.get_mut("layers.1.q_proj").unwrap();
    layer.a = layer.a.narrow(1, 0, 5).unwrap();
    let error = message(model.import_adapter("x", &weights));
    for text in [
        "adapter `x`: ",
        "matches `layers.0.up_porj`; nearest: `layers.0.up_proj`",
        "`layers.1.q_proj.lora_A.weight` has shape [2, 5]; with rank 2 it must be [2, 12]",
    ] {
        assert!(error.contains(text), "{error}");
    }
    assert_eq!(model.snapshot(), before);
    assert!(message(model.import_adapter("x", &AdapterWeights::default())).contains("no tensors"));
}

#[test]
fn a_swap_may_come_from_the_very_adapter() {
    let (mut model, _) = running();
    let want = to_vec(&model.forward(&ids(2)).unwrap());
    let mut weights = model.export_adapter("live").unwrap();
    let lora = model.layers[0].q_proj.lora().unwrap();
    let layer = weights.layers.get_mut("layers.0.q_proj").unwrap();
    (layer.a, layer.b) = (
        lora.lora_a().as_tensor().clone(),
        lora.lora_b().as_tensor().clone(),
    );
    model.swap_adapter("live", &weights).unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), want);
}

#[test]
fn after_a_swap_of_some_layers_a_saved_folder_loads_again() {
    let (mut model, _) = running();
    model.rename_adapter("live", "default").unwrap();
    let (weights, want) = made(&PeftConfig::new(["q_proj"]).dim(2));
    model.swap_adapter("default", &weights).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path()).unwrap();
    model.load_adapter(dir.path()).unwrap();
    assert_eq!(model.adapters().unwrap().names(), ["default"]);
    let error = relative_error(
        &model.forward(&ids(2)).unwrap().flatten_all().unwrap(),
        &candle_core::Tensor::new(want, &candle_core::Device::Cpu).unwrap(),
    );
    assert!(error < 1e-6, "{error}");
}

#[test]
fn an_adapter_without_a_linear_layer_is_refused() {
    let (weights, _) = made(&PeftConfig::new(["q_proj"]).modules_to_save(["embed"]));
    let mut model = Model::new(DType::F32);
    let bare = AdapterWeights {
        layers: Default::default(),
        ..weights
    };
    let error = message(model.import_adapter("bare", &bare));
    assert!(error.contains("nothing for a linear layer"), "{error}");
    assert!(model.adapters().is_err() || model.adapters().unwrap().names().is_empty());
}
