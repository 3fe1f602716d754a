//! Parameters of the base that an adapter trains: `modules_to_save` and `bias`.

use candle_core::{DType, Module};
use lora_core::{BiasMode, LoraTargets, PeftConfig, Selection};
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

fn config() -> PeftConfig {
    PeftConfig::new(["q_proj"]).dim(2)
}

#[test]
fn a_saved_linear_layer_acts_where_its_adapter_is_selected() {
    let mut model = Model::new(DType::F32);
    let base = to_vec(&model.forward(&ids(4)).unwrap());
    for name in ["x", "y"] {
        let report = model
            .add_adapter(name, &config().modules_to_save(["head"]))
            .unwrap();
        assert_eq!(report.saved_parameters, 5 * 12 + 5);
    }
    // It begins as the base's.
    model.set_adapter("x").unwrap();
    assert_eq!(to_vec(&model.forward(&ids(4)).unwrap()), base);
    ["x", "y"].iter().for_each(|name| model.fill(name));
    model.eval().unwrap();
    let outputs = ["x", "y"].map(|name| model.sum_of(&[name], &ids(4)));
    assert!(relative_error(&outputs[0], &outputs[1]) > 1e-2);
    let none = Selection::none().scope(|| model.forward(&ids(4))).unwrap();
    assert_eq!(to_vec(&none), base);

    // Each of several adapters has its own, and so have the rows of a batch.
    let adapters = model.adapters().unwrap();
    let rows = adapters
        .rows(&[Some("y"), None, Some("x"), Some("y")])
        .unwrap();
    let mixed = rows.scope(|| model.forward(&ids(4))).unwrap();
    for (row, output) in [(0, &outputs[1]), (2, &outputs[0]), (3, &outputs[1])] {
        let error = relative_error(&mixed.get(row).unwrap(), &output.get(row).unwrap());
        assert!(error < 1e-5, "row {row}: {error}");
    }
    let base_row = none.get(1).unwrap();
    assert_eq!(to_vec(&mixed.get(1).unwrap()), to_vec(&base_row));

    let error = message(model.set_adapters(&["x", "y"]));
    assert!(
        error.contains("can't be summed with `x`: both replace `head`"),
        "{error}"
    );
    assert!(message(adapters.weighted(&[("x", 0.5)])).contains("its weight can only be 1"));
    model.merge_adapters(&["y"]).unwrap();
    assert!(relative_error(&model.forward(&ids(4)).unwrap(), &outputs[1]) < 1e-5);
}

#[test]
fn a_saved_layer_trains_with_its_adapter() {
    let mut model = Model::new(DType::F32);
    model
        .add_adapter("x", &config().modules_to_save(["head"]))
        .unwrap();
    model.fill("x");
    let names = |model: &mut Model| -> Vec<String> {
        let vars = model.named_lora_vars().unwrap();
        vars.into_iter().map(|(name, _)| name).collect()
    };
    assert!(names(&mut model).is_empty());
    model.set_adapter("x").unwrap();
    assert_eq!(names(&mut model)[4..], ["head.weight", "head.bias"]);
    let loss = model
        .forward(&ids(2))
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap();
    model.check_gradients(&loss.backward().unwrap()).unwrap();

    // Rows of a batch train the layers of their own adapters.
    model
        .add_adapter("y", &config().modules_to_save(["head"]))
        .unwrap();
    model.fill("y");
    let adapters = model.adapters().unwrap();
    adapters
        .set(&adapters.rows(&[Some("x"), Some("y"), None]).unwrap())
        .unwrap();
    assert_eq!(model.lora_vars().unwrap().len(), 12);
    let loss = model
        .forward(&ids(3))
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap();
    model.check_gradients(&loss.backward().unwrap()).unwrap();
}

#[test]
fn a_trained_bias_stands_in_for_the_bases() {
    let mut model = Model::new(DType::F32);
    let base = to_vec(&model.forward(&ids(2)).unwrap());
    let bias = to_vec(model.layers[0].q_proj.bias().unwrap());
    let report = model
        .add_adapter("x", &config().bias(BiasMode::LoraOnly))
        .unwrap();
    assert_eq!(report.saved_parameters, 2 * 12);
    model.set_adapter("x").unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
    model.fill("x");
    let with_bias = model.forward(&ids(2)).unwrap();
    assert_ne!(to_vec(&with_bias), base);
    let loss = with_bias.sqr().unwrap().sum_all().unwrap();
    model.check_gradients(&loss.backward().unwrap()).unwrap();

    let xs = lora_tests::randn(4, (6, 12), DType::F32);
    let layer = model.layers[0].q_proj.clone();
    let adapters = model.adapters().unwrap();
    let rows = adapters.rows(&[None, Some("x"), None]).unwrap();
    let mixed = rows.scope(|| layer.forward(&xs)).unwrap();
    let all = layer.forward(&xs).unwrap();
    let error = relative_error(
        &mixed.narrow(0, 2, 2).unwrap(),
        &all.narrow(0, 2, 2).unwrap(),
    );
    assert!(error < 1e-5);

    model.merge().unwrap();
    assert!(relative_error(&model.forward(&ids(2)).unwrap(), &with_bias) < 1e-5);
    model.unmerge().unwrap();
    model.delete_adapter("x").unwrap();
    assert_eq!(to_vec(model.layers[0].q_proj.bias().unwrap()), bias);
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
}

#[test]
fn parameters_outside_of_linear_layers_stand_in_the_model_while_selected() {
    let mut model = Model::new(DType::F32);
    let base = to_vec(&model.forward(&ids(2)).unwrap());
    model.add("plain", &config());
    let plain = to_vec(&model.sum_of(&["plain"], &ids(2)));
    model
        .add_adapter(
            "x",
            &config()
                .bias(BiasMode::All)
                .modules_to_save(["embed", "norm"]),
        )
        .unwrap();
    model.fill("x");
    model.eval().unwrap();
    assert_eq!(
        to_vec(&model.forward(&ids(2)).unwrap()),
        plain,
        "not active yet"
    );
    let x = to_vec(&model.sum_of(&["x"], &ids(2)));
    assert_ne!(x, plain);
    let loss = model
        .forward(&ids(2))
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap();
    model.check_gradients(&loss.backward().unwrap()).unwrap();
    let names: Vec<String> = model
        .named_lora_vars()
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for name in [
        "embed.weight",
        "norm.weight",
        "layers.1.norm.bias",
        "head.bias",
    ] {
        assert!(
            names.iter().any(|other| other == name),
            "{name} of {names:?}"
        );
    }

    // Every way back.
    model.disable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
    model.enable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), x);
    model.merge_adapters(&["plain"]).unwrap();
    model.unmerge().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), x);
    assert_eq!(to_vec(&model.sum_of(&["plain"], &ids(2))), plain);
    model.set_adapter("x").unwrap();
    model.add("later", &config());
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), x);
    model.delete_adapter("x").unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), plain);
    model.remove_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
}

#[test]
fn what_a_scope_cannot_switch_is_refused() {
    let mut model = Model::new(DType::F32);
    model.add("plain", &config());
    model.add("x", &config().modules_to_save(["norm"]));
    model.set_adapter("x").unwrap();
    let adapters = model.adapters().unwrap();
    let plain = adapters.select(&["plain"]).unwrap();
    let x = adapters.select(&["x", "plain"]).unwrap();
    for error in [
        plain
            .scope(|| model.forward(&ids(2)))
            .unwrap_err()
            .to_string(),
        Selection::none()
            .scope(|| model.forward(&ids(2)))
            .unwrap_err()
            .to_string(),
        message(adapters.set(&plain)),
        message(adapters.set(&adapters.rows(&[Some("x"), None]).unwrap())),
    ] {
        assert!(
            error.contains("adapter `x`: trains `layers.0.norm."),
            "{error}"
        );
        assert!(error.contains("set_adapter"), "{error}");
    }
    x.scope(|| model.forward(&ids(2))).unwrap();
    adapters.set(&x).unwrap();
    let error = message(model.add_adapter("y", &config().modules_to_save(["embed"])));
    assert!(error.contains("`x` has such parameters already"), "{error}");
    assert_eq!(model.adapters().unwrap().names(), ["plain", "x"]);
}

#[test]
fn what_is_saved_is_exported_imported_and_swapped() {
    let mut model = Model::new(DType::F32);
    let config = config()
        .bias(BiasMode::All)
        .modules_to_save(["head", "embed"]);
    model.add("x", &config);
    let want = to_vec(&model.sum_of(&["x"], &ids(2)));
    let weights = model.export_adapter("x").unwrap();
    assert_eq!(weights.bias, BiasMode::All);
    assert_eq!(weights.modules_to_save, ["head", "embed"]);
    let keys: Vec<&str> = weights.saved.keys().map(String::as_str).collect();
    let want_keys = [
        "embed.weight",
        "head.bias",
        "head.weight",
        "layers.0.norm.bias",
        "layers.0.q_proj.bias",
        "layers.1.norm.bias",
        "layers.1.q_proj.bias",
    ];
    assert_eq!(keys, want_keys);

    let mut other = Model::new(DType::F32);
    other.import_adapter("y", &weights).unwrap();
    assert_eq!(to_vec(&other.sum_of(&["y"], &ids(2))), want);
    let again = other.export_adapter("y").unwrap();
    assert_eq!(again.saved.len(), weights.saved.len());

    other.fill("y");
    other.swap_adapter("y", &weights).unwrap();
    assert_eq!(to_vec(&other.forward(&ids(2)).unwrap()), want);

    let mut wrong = weights.clone();
    let head = wrong.saved.remove("head.weight").unwrap();
    wrong.saved.insert("haed.weight".into(), head);
    let mut third = Model::new(DType::F32);
    let error = message(third.import_adapter("z", &wrong));
    assert!(error.contains("the model has no parameter `haed.weight`; nearest: `head.weight`"));
    let error = message(other.swap_adapter("y", &wrong));
    assert!(
        error.contains("`haed.weight` is not in the adapter in place"),
        "{error}"
    );
}
