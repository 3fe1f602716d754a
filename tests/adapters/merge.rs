//! Adapters in the weights.

use candle_core::{DType, Module, Tensor};
use lora_core::{LoraTargets, PeftConfig, Selection};
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

#[test]
fn merging_any_set_equals_the_forward_pass() {
    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 5e-2)] {
        for names in [vec!["a"], vec!["b", "c"], vec!["c", "a", "b"], vec![]] {
            let mut model = Model::with_three(dtype);
            let want = model.sum_of(&names, &ids(2));
            // What is active has no say in it.
            model.set_adapter("c").unwrap();
            let c = to_vec(&model.forward(&ids(2)).unwrap());
            model.merge_adapters(&names).unwrap();
            let error = relative_error(&model.forward(&ids(2)).unwrap(), &want);
            assert!(error < bound, "{names:?} in {dtype:?}: {error}");
            model.unmerge().unwrap();
            assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), c);
        }
    }
}

#[test]
fn merging_twice_is_merging_once_and_unmerging_restores_every_bit() {
    let mut model = Model::with_three(DType::BF16);
    model.set_adapters(&["b", "a"]).unwrap();
    let before = model.snapshot();
    model.merge().unwrap();
    let once = model.snapshot();
    assert_ne!(once, before);
    model.merge().unwrap();
    model.merge_adapters(&["b", "a"]).unwrap();
    assert_eq!(model.snapshot(), once);
    model.unmerge().unwrap();
    assert_eq!(model.snapshot(), before);
    model.unmerge().unwrap();
    assert_eq!(model.snapshot(), before);
}

#[test]
fn merging_after_unmerging_gives_the_same_bits() {
    let mut model = Model::with_three(DType::F32);
    model.merge_adapters(&["a", "b"]).unwrap();
    let first = model.snapshot();
    model.unmerge().unwrap();
    model.merge_adapters(&["c"]).unwrap();
    model.unmerge().unwrap();
    model.merge_adapters(&["a", "b"]).unwrap();
    assert_eq!(model.snapshot(), first);
}

#[test]
fn what_is_not_finite_is_not_merged() {
    for (dtype, value) in [
        (DType::F32, f32::NAN),
        (DType::F32, f32::INFINITY),
        (DType::F16, 1e5),
    ] {
        let mut model = Model::with_three(dtype);
        model.set_adapters(&["a", "b"]).unwrap();
        // The last layer: the ones before it must not stay merged.
        let vars = model.named_adapter_vars("b").unwrap();
        let at = |name: &str| vars.iter().rfind(|(key, _)| key.ends_with(name)).unwrap();
        let b = &at("lora_B.weight").1;
        b.set(&Tensor::full(value, b.shape(), b.device()).unwrap())
            .unwrap();
        let before = format!("{:?}", model.snapshot());
        let error = message(model.merge());
        assert!(
            error.starts_with("layers.1.up_proj: merging makes"),
            "{error}"
        );
        assert_eq!(format!("{:?}", model.snapshot()), before);
        assert!(message(model.merge_adapters(&["b"])).contains("NaN or infinite"));
        model.merge_adapters(&["a"]).unwrap();
    }
}

#[test]
fn disabling_after_merging_gives_the_base() {
    let mut model = Model::with_three(DType::F32);
    let base = to_vec(&model.sum_of(&[], &ids(1)));
    model.set_adapter("b").unwrap();
    model.merge().unwrap();
    let merged = to_vec(&model.forward(&ids(1)).unwrap());
    assert_ne!(merged, base);
    let scoped = Selection::none().scope(|| model.forward(&ids(1))).unwrap();
    assert_eq!(to_vec(&scoped), base);
    model.disable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), base);
    model.enable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), merged);
}

#[test]
fn while_merged_nothing_else_can_be_selected() {
    let mut model = Model::with_three(DType::F32);
    let weights = model.export_adapter("a").unwrap();
    let adapters = model.adapters().unwrap();
    let b = adapters.select(&["b"]).unwrap();
    model.set_adapter("a").unwrap();
    model.merge().unwrap();
    let before = model.snapshot();
    let refusals = [
        message(model.set_adapter("b")),
        message(model.set_adapters(&["a", "b"])),
        message(adapters.set(&b)),
        message(model.delete_adapter("b")),
        message(model.swap_adapter("a", &weights)),
        message(model.import_adapter("d", &weights)),
        message(model.add_adapter("d", &PeftConfig::new(["q_proj"]))),
        message(model.merge_adapters(&["b"])),
        b.scope(|| model.forward(&ids(1))).unwrap_err().to_string(),
    ];
    for error in refusals {
        assert!(error.contains("`unmerge`"), "{error}");
        assert_eq!(model.snapshot(), before, "{error}");
    }
    model.unmerge().unwrap();
    model.set_adapter("b").unwrap();
}

#[test]
fn removing_the_adapters_of_a_merged_model_leaves_the_base() {
    let mut model = Model::with_three(DType::F32);
    let base = to_vec(&model.sum_of(&[], &ids(1)));
    model.merge_adapters(&["a", "b", "c"]).unwrap();
    model.remove_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), base);
    model.add("a", &PeftConfig::new(["q_proj"]));
    model.set_adapter("a").unwrap();
}

#[test]
fn a_merged_layer_alone_is_completed_by_the_model() {
    let mut model = Model::with_three(DType::F32);
    let want = model.sum_of(&["b"], &ids(1));
    model.layers[0].q_proj.merge().unwrap();
    assert!(message(model.merge_adapters(&["c"])).contains("`unmerge`"));
    model.merge().unwrap();
    assert!(model.layers[1].up_proj.is_merged());
    assert!(relative_error(&model.forward(&ids(1)).unwrap(), &want) < 1e-5);
}

#[test]
fn merging_for_good_equals_merging_and_removes_the_wrappers() {
    let config = PeftConfig::new(["q_proj"])
        .lora_bias(true)
        .modules_to_save(["head", "layers.0.norm"]);
    let mut model = Model::with_three(DType::F32);
    model.add("x", &config);
    model.set_adapters(&["x", "b"]).unwrap();
    let tensors = model.merged_tensors().unwrap();
    let keys: Vec<&str> = tensors.keys().map(String::as_str).collect();
    let want = [
        "head.bias",
        "head.weight",
        "layers.0.norm.bias",
        "layers.0.norm.weight",
        "layers.0.q_proj.bias",
        "layers.0.q_proj.weight",
        "layers.0.up_proj.weight",
        "layers.1.q_proj.bias",
        "layers.1.q_proj.weight",
        "layers.1.up_proj.weight",
    ];
    assert_eq!(keys, want);
    model.merge().unwrap();
    let merged = to_vec(&model.forward(&ids(2)).unwrap());
    model.unmerge().unwrap();
    model.merge_and_unload().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), merged);
    assert!(model.adapter_status().unwrap().is_empty());
    model
        .for_each_linear(&mut |path, linear| {
            assert!(linear.lora().is_none() && !linear.is_merged(), "{path}");
            if let Some(tensor) = tensors.get(&format!("{path}.weight")) {
                assert_eq!(to_vec(linear.weight()), to_vec(tensor), "{path}");
            }
            Ok(())
        })
        .unwrap();

    // A base that begins with those tensors is the same model.
    let mut reloaded = Model::new(DType::F32);
    reloaded.replace(&tensors);
    assert_eq!(to_vec(&reloaded.forward(&ids(2)).unwrap()), merged);

    // Nothing of it is trained any more, and it can be adapted again.
    let gradients = |model: &mut Model| {
        model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
        let loss = model.forward(&ids(2)).unwrap().sum_all().unwrap();
        loss.backward().unwrap().get_ids().count()
    };
    assert_eq!(
        gradients(&mut model),
        gradients(&mut Model::new(DType::F32))
    );
}
