//! Adding, naming, choosing and deleting adapters.

use candle_core::{DType, Module, Tensor, backprop::GradStore};
use lora_core::{LoraTargets, PeftConfig};
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

#[test]
fn adding_does_not_activate() {
    let mut model = Model::new(DType::F32);
    let base = to_vec(&model.forward(&ids(2)).unwrap());
    model.add("a", &PeftConfig::new(["q_proj"]));
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
    assert!(model.lora_vars().unwrap().is_empty());
    assert_eq!(model.adapters().unwrap().names(), ["a"]);
    assert!(model.adapters().unwrap().active().is_empty());
    model.set_adapter("a").unwrap();
    assert_ne!(to_vec(&model.forward(&ids(2)).unwrap()), base);
    assert_eq!(model.lora_vars().unwrap().len(), 4);
}

#[test]
fn apply_lora_adds_and_activates_default() {
    let mut model = Model::new(DType::F32);
    model.add("other", &PeftConfig::new(["up_proj"]));
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    assert_eq!(model.adapters().unwrap().names(), ["other", "default"]);
    assert_eq!(model.adapters().unwrap().active(), ["default"]);
    let error = message(model.apply_lora(&PeftConfig::new(["up_proj"])));
    assert!(error.starts_with("layers.0.q_proj: it carries an adapter already"));
}

#[test]
fn several_active_adapters_add_up_layer_by_layer() {
    let mut model = Model::with_three(DType::F64);
    let (base, a) = (model.sum_of(&[], &ids(2)), model.sum_of(&["a"], &ids(2)));
    // One layer alone, to compare with the sum of what each adds to it.
    let layer = model.layers[1].clone();
    let xs = lora_tests::randn(4, (5, 12), DType::F64);
    let adapters = model.adapters().unwrap();
    let run = |names: &[&str]| {
        let selection = adapters.select(names).unwrap();
        selection.scope(|| layer.q_proj.forward(&xs)).unwrap()
    };
    let mut sum = run(&[]);
    for name in ["a", "b", "c"] {
        sum = ((sum + run(&[name])).unwrap() - run(&[])).unwrap();
    }
    assert!(relative_error(&run(&["a", "b", "c"]), &sum) < 1e-13);
    assert!(relative_error(&run(&["c", "a", "b"]), &sum) < 1e-13);
    assert!(relative_error(&a, &base) > 1e-3);
}

#[test]
fn adapters_on_disjoint_layers_skip_each_other() {
    let mut model = Model::new(DType::F32);
    model.add("q", &PeftConfig::new(["layers.0.q_proj"]));
    model.add("up", &PeftConfig::new(["layers.1.up_proj"]));
    model.set_adapters(&["q", "up"]).unwrap();
    let report = model.lora_report().unwrap();
    let paths: Vec<_> = report.sites.iter().map(|site| &*site.path).collect();
    assert_eq!(paths, ["layers.0.q_proj", "layers.1.up_proj"]);

    let xs = lora_tests::randn(4, (5, 12), DType::F32);
    let both = to_vec(&model.layers[1].up_proj.forward(&xs).unwrap());
    model.set_adapter("up").unwrap();
    assert_eq!(to_vec(&model.layers[1].up_proj.forward(&xs).unwrap()), both);
    model.set_adapter("q").unwrap();
    assert_ne!(to_vec(&model.layers[1].up_proj.forward(&xs).unwrap()), both);
}

/// The names of the variables that a backward pass reached.
fn reached(model: &mut Model, grads: &GradStore, names: &[&str]) -> Vec<String> {
    let mut reached = Vec::new();
    for name in names {
        for (var_name, var) in model.named_adapter_vars(name).unwrap() {
            if grads.get(&var).is_some() {
                reached.push(format!("{name}: {var_name}"));
            }
        }
    }
    reached
}

#[test]
fn what_is_trained_follows_activation() {
    let mut model = Model::with_three(DType::F32);
    for active in [vec!["a"], vec!["b", "a"], vec!["c"], vec![]] {
        model.set_adapters(&active).unwrap();
        let loss = model.forward(&ids(2)).unwrap().sqr().unwrap();
        let grads = loss.sum_all().unwrap().backward().unwrap();
        model.check_gradients(&grads).unwrap();
        let reached = reached(&mut model, &grads, &["a", "b", "c"]);
        let vars = model.lora_vars().unwrap();
        assert_eq!(reached.len(), vars.len(), "{active:?}");
        assert!(vars.iter().all(|var| grads.get(var).is_some()));
    }
    model.set_adapters(&["a", "c"]).unwrap();
    let names: Vec<String> = model
        .named_lora_vars()
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.contains(&"layers.1.q_proj.lora_A.a.weight".to_string()));
    assert!(names.contains(&"layers.1.q_proj.lora_B.c.weight".to_string()));
}

#[test]
fn only_the_active_adapter_changes_in_training() {
    use candle_nn::{Optimizer, SGD};
    let mut model = Model::with_three(DType::F32);
    model.set_adapter("b").unwrap();
    let (before, _) = model.snapshot();
    let mut optimizer = SGD::new(model.lora_vars().unwrap(), 0.1).unwrap();
    let loss = model.forward(&ids(2)).unwrap().sqr().unwrap();
    optimizer.backward_step(&loss.sum_all().unwrap()).unwrap();
    let (after, _) = model.snapshot();
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        assert_eq!(before != after, name.starts_with("b: "), "{name}");
    }
}

#[test]
fn unknown_and_duplicate_names_change_nothing() {
    let mut model = Model::with_three(DType::F32);
    model.set_adapters(&["b", "a"]).unwrap();
    model.rename_adapter("c", "classify").unwrap();
    let config = PeftConfig::new(["q_proj"]);
    let weights = model.export_adapter("a").unwrap();
    let adapters = model.adapters().unwrap();
    let before = model.snapshot();
    let unknown = "adapter `clasify`: is unknown; nearest: `classify`";
    let taken = "adapter `a`: is there already";
    type Verb<'a> = Box<dyn Fn(&mut Model) -> lora_core::Result<()> + 'a>;
    let verbs: Vec<(&str, Verb)> = vec![
        (unknown, Box::new(|m| m.set_adapter("clasify"))),
        (unknown, Box::new(|m| m.set_adapters(&["a", "clasify"]))),
        (unknown, Box::new(|m| m.delete_adapter("clasify"))),
        (unknown, Box::new(|m| m.rename_adapter("clasify", "x"))),
        (unknown, Box::new(|m| m.swap_adapter("clasify", &weights))),
        (unknown, Box::new(|m| m.merge_adapters(&["clasify"]))),
        (unknown, Box::new(|m| m.adapter_vars("clasify").map(drop))),
        (unknown, Box::new(|m| m.export_adapter("clasify").map(drop))),
        (
            unknown,
            Box::new(|_| adapters.select(&["clasify"]).map(drop)),
        ),
        (
            unknown,
            Box::new(|_| adapters.rows(&[None, Some("clasify")]).map(drop)),
        ),
        (taken, Box::new(|m| m.add_adapter("a", &config).map(drop))),
        (
            taken,
            Box::new(|m| m.import_adapter("a", &weights).map(drop)),
        ),
        (taken, Box::new(|m| m.rename_adapter("b", "a"))),
        ("is named twice", Box::new(|m| m.set_adapters(&["a", "a"]))),
        (
            "can't be a name",
            Box::new(|m| m.add_adapter("", &config).map(drop)),
        ),
        (
            "can't be a name",
            Box::new(|m| m.add_adapter("a.b", &config).map(drop)),
        ),
        (
            "can't be a name",
            Box::new(|m| m.rename_adapter("a", "../b")),
        ),
        (
            "no linear layer",
            Box::new(|m| m.add_adapter("new", &PeftConfig::new(["k_proj"])).map(drop)),
        ),
    ];
    for (text, verb) in verbs {
        let error = message(verb(&mut model));
        assert!(error.contains(text), "{error}");
        assert_eq!(model.snapshot(), before, "{error}");
    }
    let mut bare = Model::new(DType::F32);
    assert!(message(bare.adapters()).contains("has no adapter"));
    assert!(message(bare.set_adapter("a")).contains("has no adapter"));
}

#[test]
fn renaming_keeps_what_is_active_and_its_place() {
    let mut model = Model::with_three(DType::F32);
    let want = to_vec(&model.sum_of(&["b", "a"], &ids(2)));
    let selection = model.adapters().unwrap().select(&["b", "a"]).unwrap();
    model.rename_adapter("b", "x").unwrap();
    assert_eq!(model.adapters().unwrap().names(), ["a", "x", "c"]);
    assert_eq!(model.adapters().unwrap().active(), ["x", "a"]);
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), want);
    // A selection goes by what an adapter is, not by what it is called.
    model.set_adapter("c").unwrap();
    assert_eq!(
        to_vec(&selection.scope(|| model.forward(&ids(2))).unwrap()),
        want
    );
    model.rename_adapter("x", "x").unwrap();
}

#[test]
fn deleting_the_active_adapter_picks_the_one_added_first() {
    let mut model = Model::with_three(DType::F32);
    let a = to_vec(&model.sum_of(&["a"], &ids(2)));
    let base = to_vec(&model.sum_of(&[], &ids(2)));
    model.set_adapters(&["b", "c"]).unwrap();
    model.delete_adapter("c").unwrap();
    assert_eq!(model.adapters().unwrap().active(), ["b"]);
    model.delete_adapter("b").unwrap();
    assert_eq!(model.adapters().unwrap().active(), ["a"]);
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), a);
    assert!(
        model.layers[1].up_proj.lora().is_none(),
        "nothing is left here"
    );
    model.delete_adapter("a").unwrap();
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), base);
    assert!(model.adapter_status().unwrap().is_empty());

    // An inactive one leaves the active alone.
    let mut model = Model::with_three(DType::F32);
    model.set_adapter("c").unwrap();
    model.delete_adapter("a").unwrap();
    assert_eq!(model.adapters().unwrap().active(), ["c"]);
}

#[test]
fn a_deleted_adapter_is_no_longer_selected_by_what_was_made_before() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    let old = adapters.select(&["a", "b"]).unwrap();
    model.delete_adapter("b").unwrap();
    model.add("b", &PeftConfig::new(["q_proj"]));
    let error = old
        .scope(|| model.forward(&ids(1)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("the adapter `b` of this selection is not there any more"));
    assert!(message(adapters.set(&old)).contains("`b`"));

    model.remove_adapters().unwrap();
    model.add("a", &PeftConfig::new(["q_proj"]));
    let error = old
        .scope(|| model.forward(&ids(1)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("make another with `adapters()`"), "{error}");
    assert!(message(model.adapters().unwrap().set(&old)).contains("of another model"));
}

#[test]
fn the_status_counts_layers_and_parameters() {
    let mut model = Model::with_three(DType::F32);
    model.set_adapters(&["c", "a"]).unwrap();
    let lines: Vec<_> = model
        .adapter_status()
        .unwrap()
        .into_iter()
        .map(|line| {
            (
                line.name,
                line.active,
                line.merged,
                line.sites,
                line.parameters,
            )
        })
        .collect();
    let want = [
        ("a", true, false, 2, 2 * 2 * 24),
        ("b", false, false, 4, 4 * 3 * 24),
        ("c", true, false, 2, 2 * 24),
    ]
    .map(|(name, active, merged, sites, parameters)| {
        (name.to_string(), active, merged, sites, parameters)
    });
    assert_eq!(lines, want);
    assert_eq!(model.lora_report().unwrap().trainable_parameters(), 6 * 24);
    model.merge_adapters(&["b"]).unwrap();
    let merged = model.adapter_status().unwrap();
    let merged = merged
        .iter()
        .filter(|line| line.merged)
        .map(|line| &*line.name);
    assert_eq!(merged.collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a_handle_switches_the_model_without_it() {
    let mut model = Model::with_three(DType::F32);
    let wants = ["a", "b"].map(|name| to_vec(&model.sum_of(&[name], &ids(1))));
    let adapters = model.adapters().unwrap();
    let selections = ["a", "b"].map(|name| adapters.select(&[name]).unwrap());
    for _ in 0..2 {
        for (selection, want) in selections.iter().zip(&wants) {
            adapters.set(selection).unwrap();
            assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), *want);
        }
    }
}

#[test]
fn clones_share_adapters_and_what_is_selected() {
    let mut model = Model::with_three(DType::F32);
    let clone = model.clone();
    let a: Tensor = model.sum_of(&["a"], &ids(1));
    assert_eq!(to_vec(&clone.forward(&ids(1)).unwrap()), to_vec(&a));
    model.remove_adapters().unwrap();
    let error = clone.forward(&ids(1)).unwrap_err().to_string();
    assert!(error.contains("taken off through a clone"), "{error}");
}
