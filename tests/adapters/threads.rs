//! Many threads, each with its own selection, over one model.

use candle_core::{DType, Module, Var};
use lora_core::{LoraTargets, Selection};
use lora_tests::to_vec;

use crate::model::{Model, ids};

/// Selections of every kind.
fn selections(model: &mut Model) -> Vec<Selection> {
    let adapters = model.adapters().unwrap();
    let mut all = vec![Selection::none()];
    for names in [
        vec!["a"],
        vec!["b"],
        vec!["c"],
        vec!["a", "b"],
        vec!["c", "b", "a"],
    ] {
        all.push(adapters.select(&names).unwrap());
    }
    for rows in [[Some("a"), None], [Some("b"), Some("c")], [None, None]] {
        all.push(adapters.rows(&rows).unwrap());
    }
    all
}

#[test]
fn threads_with_different_selections_compute_what_one_does() {
    let mut model = Model::with_three(DType::F32);
    let selections = selections(&mut model);
    let model = model;
    let run = |selection: &Selection| to_vec(&selection.scope(|| model.forward(&ids(4))).unwrap());
    let wants: Vec<_> = selections.iter().map(run).collect();
    std::thread::scope(|threads| {
        for thread in 0..16 {
            let (selections, wants, run) = (&selections, &wants, &run);
            threads.spawn(move || {
                for i in 0..30 {
                    let which = (thread * 7 + i) % selections.len();
                    assert_eq!(run(&selections[which]), wants[which], "selection {which}");
                }
            });
        }
    });
}

#[test]
fn threads_compute_gradients_of_their_own_selection() {
    let mut model = Model::with_three(DType::F32);
    let vars: Vec<Vec<Var>> = ["a", "b", "c"]
        .map(|name| model.adapter_vars(name).unwrap())
        .into();
    let adapters = model.adapters().unwrap();
    let run = |which: usize| -> Vec<Vec<f64>> {
        let selection = adapters.select(&[["a", "b", "c"][which]]).unwrap();
        let ys = selection.scope(|| model.forward(&ids(4))).unwrap();
        // The scope is over: what a pass was made of, its backward pass knows.
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let grads = vars[which]
            .iter()
            .map(|var| to_vec(grads.get(var).unwrap()));
        grads.collect()
    };
    let wants: Vec<_> = (0..3).map(run).collect();
    std::thread::scope(|threads| {
        for thread in 0..9 {
            let (wants, run) = (&wants, &run);
            threads.spawn(move || {
                for i in 0..10 {
                    let which = (thread + i) % 3;
                    assert_eq!(run(which), wants[which]);
                }
            });
        }
    });
}

#[test]
fn switching_in_one_thread_leaves_the_scopes_of_others_alone() {
    let mut model = Model::with_three(DType::F32);
    let selections = selections(&mut model);
    let adapters = model.adapters().unwrap();
    let model = model;
    let want = to_vec(&selections[4].scope(|| model.forward(&ids(4))).unwrap());
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for i in 0..2000 {
                adapters.set(&selections[1 + i % 5]).unwrap();
            }
        });
        for _ in 0..4 {
            threads.spawn(|| {
                for _ in 0..50 {
                    let ys = selections[4].scope(|| model.forward(&ids(4))).unwrap();
                    assert_eq!(to_vec(&ys), want);
                }
            });
        }
    });
}

#[test]
fn handles_and_selections_are_for_all_threads() {
    fn shared<T: Send + Sync + Clone>() {}
    shared::<Selection>();
    shared::<lora_core::Adapters>();
    shared::<lora_core::nn::Linear>();
}
