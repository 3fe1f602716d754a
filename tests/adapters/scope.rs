//! Selections for a while, on one thread.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Module};
use lora_core::{LoraTargets, Selection};
use lora_tests::to_vec;

use crate::model::{Model, ids};

#[test]
fn nested_scopes_restore_what_was_selected_before() {
    let mut model = Model::with_three(DType::F32);
    let outputs =
        [vec![], vec!["a"], vec!["b", "c"]].map(|names| to_vec(&model.sum_of(&names, &ids(2))));
    let [base, a, bc] = outputs;
    model.set_adapter("a").unwrap();
    let both = model.adapters().unwrap().select(&["b", "c"]).unwrap();
    let run = || to_vec(&model.forward(&ids(2)).unwrap());
    assert_eq!(run(), a);
    both.scope(|| {
        assert_eq!(run(), bc);
        Selection::none().scope(|| {
            assert_eq!(run(), base);
            both.scope(|| assert_eq!(run(), bc));
            assert_eq!(run(), base);
        });
        assert_eq!(run(), bc);
    });
    assert_eq!(run(), a);
}

#[test]
fn a_panic_ends_its_scopes() {
    let mut model = Model::with_three(DType::F32);
    let a = to_vec(&model.sum_of(&["a"], &ids(1)));
    let b = model.adapters().unwrap().select(&["b"]).unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        b.scope(|| Selection::none().scope(|| panic!("on purpose")));
    }));
    assert!(caught.is_err());
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), a);
}

#[test]
fn a_scope_is_for_one_model_and_none_for_all() {
    let (mut one, mut two) = (Model::with_three(DType::F32), Model::with_three(DType::F32));
    let base = to_vec(&one.sum_of(&[], &ids(1)));
    let a = to_vec(&one.sum_of(&["a"], &ids(1)));
    let b = to_vec(&two.sum_of(&["b"], &ids(1)));
    let c = one.adapters().unwrap().select(&["c"]).unwrap();
    c.scope(|| {
        assert_ne!(to_vec(&one.forward(&ids(1)).unwrap()), a);
        assert_eq!(to_vec(&two.forward(&ids(1)).unwrap()), b);
        Selection::none().scope(|| {
            for model in [&one, &two] {
                assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), base);
            }
        });
    });
}

#[test]
fn disabling_and_enabling_restores_the_selection() {
    let mut model = Model::with_three(DType::F32);
    let base = to_vec(&model.sum_of(&[], &ids(1)));
    let ab = to_vec(&model.sum_of(&["a", "b"], &ids(1)));
    model.disable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), base);
    // Neither a scope nor another selection enables.
    let c = model.adapters().unwrap().select(&["c"]).unwrap();
    assert_eq!(to_vec(&c.scope(|| model.forward(&ids(1))).unwrap()), base);
    assert!(!model.layers[0].q_proj.lora().unwrap().is_enabled());
    model.enable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), ab);
    // One layer can be disabled alone.
    model.set_adapter("a").unwrap();
    for block in &mut model.layers {
        block.q_proj.lora_mut().unwrap().set_enabled(false);
    }
    assert_eq!(to_vec(&model.forward(&ids(1)).unwrap()), base);
}
