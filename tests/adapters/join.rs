//! Models whose parts were adapted apart.

use candle_core::{DType, Module};
use lora_core::{LoraTargets, PeftConfig, Selection, patch_linear_module};
use lora_tests::to_vec;

use crate::model::{Model, ids, message};

#[test]
fn parts_that_were_adapted_apart_become_one() {
    let mut model = Model::new(DType::F32);
    let config = PeftConfig::all_linear().dim(2);
    model.layers[0].apply_lora(&config).unwrap();
    model.layers[1].add_adapter("second", &config).unwrap();
    patch_linear_module("head", &mut model.head, &config.adapter().unwrap()).unwrap();
    for lora in [&mut model.layers[0].q_proj, &mut model.head] {
        let b = lora.lora().unwrap().lora_b();
        b.set(&b.ones_like().unwrap()).unwrap();
    }
    let before = to_vec(&model.forward(&ids(1)).unwrap());
    let part = model.head.adapters().unwrap().select(&["default"]).unwrap();

    let adapters = model.adapters().unwrap();
    assert_eq!(adapters.names(), ["default", "second"]);
    assert_eq!(adapters.active(), ["default"]);
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), before);
    assert_eq!(model.lora_vars().unwrap().len(), 4 + 2);
    let names = model.named_adapter_vars("default").unwrap();
    assert!(
        names
            .iter()
            .any(|(name, _)| name == "layers.0.q_proj.lora_A.weight")
    );
    assert!(names.iter().any(|(name, _)| name == "head.lora_A.weight"));

    // One switch now: the head follows the model, and what was made for it alone is refused.
    let base = Selection::none().scope(|| model.forward(&ids(1))).unwrap();
    model.set_adapters(&[""; 0]).unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), to_vec(&base));
    let error = part
        .scope(|| model.forward(&ids(1)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("joined"), "{error}");
}

#[test]
fn parts_with_a_mixed_batch_are_not_joined() {
    let mut model = Model::new(DType::F32);
    for layer in &mut model.layers {
        layer.apply_lora(&PeftConfig::all_linear()).unwrap();
    }
    let part = model.layers[0].adapters().unwrap();
    part.set(&part.rows(&[Some("default"), None]).unwrap())
        .unwrap();
    assert!(message(model.adapters()).contains("row by row"));
    part.set(&part.select(&["default"]).unwrap()).unwrap();
    model.adapters().unwrap();
}

#[test]
fn joining_keeps_the_weight_of_what_is_selected() {
    let mut model = Model::new(DType::F32);
    let config = PeftConfig::all_linear().dim(2);
    model.layers[0].apply_lora(&config).unwrap();
    model.layers[1].add_adapter("second", &config).unwrap();
    for var in model.layers[0].lora_vars().unwrap() {
        var.set(&var.ones_like().unwrap()).unwrap();
    }
    let part = model.layers[0].adapters().unwrap();
    part.set(&part.weighted(&[("default", 0.5)]).unwrap())
        .unwrap();
    let before = to_vec(&model.forward(&ids(1)).unwrap());
    model.adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), before);
}
