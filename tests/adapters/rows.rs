//! Mixed batches: each row its own adapter.

use candle_core::{DType, Module, Tensor, Var};
use lora_core::{DropoutPosition, LoraTargets, PeftConfig, Selection};
use lora_tests::{relative_error, to_vec};

use crate::model::{Model, ids, message};

const NAMES: [Option<&str>; 6] = [Some("a"), None, Some("b"), Some("b"), Some("c"), Some("a")];

/// Runs the whole batch under the selection of each row's adapter alone, and takes that row.
fn row_by_row(model: &mut Model, names: &[Option<&str>], ids: &Tensor) -> Tensor {
    let rows: Vec<Tensor> = names
        .iter()
        .enumerate()
        .map(|(row, name)| {
            let names: Vec<&str> = name.iter().copied().collect();
            let selection = model.adapters().unwrap().select(&names).unwrap();
            let all = selection.scope(|| model.forward(ids)).unwrap();
            all.narrow(0, row, 1).unwrap()
        })
        .collect();
    Tensor::cat(&rows, 0).unwrap()
}

#[test]
fn rows_equal_runs_with_their_adapter_alone() {
    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 2e-2)] {
        let mut model = Model::with_three(dtype);
        let rows = model.adapters().unwrap().rows(&NAMES).unwrap();
        let mixed = rows.scope(|| model.forward(&ids(6))).unwrap();
        let want = row_by_row(&mut model, &NAMES, &ids(6));
        let error = relative_error(&mixed, &want);
        assert!(error < bound, "{dtype:?}: {error}");
    }
}

#[test]
fn base_rows_are_the_bases_bit_for_bit() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mut model = Model::with_three(dtype);
        let base = Selection::none().scope(|| model.forward(&ids(6))).unwrap();
        for names in [&NAMES[..], &[None, None, None, Some("b"), None, Some("b")]] {
            let rows = model.adapters().unwrap().rows(names).unwrap();
            let mixed = rows.scope(|| model.forward(&ids(6))).unwrap();
            for (row, name) in names.iter().enumerate() {
                let same = to_vec(&mixed.get(row).unwrap()) == to_vec(&base.get(row).unwrap());
                assert_eq!(same, name.is_none(), "{dtype:?} row {row}");
            }
        }
        let rows = model.adapters().unwrap().rows(&[None::<&str>; 3]).unwrap();
        let all_base = rows.scope(|| model.forward(&ids(6))).unwrap();
        assert_eq!(to_vec(&all_base), to_vec(&base));
    }
}

#[test]
fn a_row_may_stand_for_several_of_the_batch() {
    // Two beams for each of three requests.
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    let three = adapters.rows(&[Some("b"), None, Some("a")]).unwrap();
    let six = [Some("b"), Some("b"), None, None, Some("a"), Some("a")];
    let six = adapters.rows(&six).unwrap();
    let run = |selection: &Selection| to_vec(&selection.scope(|| model.forward(&ids(6))).unwrap());
    assert_eq!(run(&three), run(&six));
}

#[test]
fn a_batch_of_one_adapter_equals_its_selection_bit_for_bit() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    let rows = adapters.rows(&[Some("b"), Some("b")]).unwrap();
    let alone = adapters.select(&["b"]).unwrap();
    let run = |selection: &Selection| to_vec(&selection.scope(|| model.forward(&ids(4))).unwrap());
    assert_eq!(run(&rows), run(&alone));
}

/// The gradients of `loss` at the variables, zero where there is none.
fn gradients(loss: &Tensor, vars: &[Var]) -> Vec<Tensor> {
    let grads = loss.backward().unwrap();
    vars.iter()
        .map(|var| match grads.get(var) {
            Some(grad) => grad.clone(),
            None => var.zeros_like().unwrap(),
        })
        .collect()
}

fn loss(ys: &Tensor) -> Tensor {
    ys.sqr().unwrap().sum_all().unwrap()
}

#[test]
fn gradients_of_a_mixed_batch_equal_those_of_each_row_alone() {
    for dropout in [0.0, 0.3] {
        for position in [DropoutPosition::Pre, DropoutPosition::Post] {
            let mut model = Model::new(DType::F64);
            let configs = [
                ("a", PeftConfig::new(["q_proj"]).dim(2).alpha(3.0)),
                ("b", PeftConfig::all_linear().dim(3).lora_bias(true)),
                ("c", PeftConfig::new(["layers.1.*"]).dim(1)),
            ];
            for (name, config) in configs {
                let config = config.dropout(dropout).dropout_position(position);
                model.add(name, &config);
            }
            model.train().unwrap();
            let adapters = model.adapters().unwrap();
            adapters.set(&adapters.rows(&NAMES).unwrap()).unwrap();
            let vars = model.lora_vars().unwrap();
            assert_eq!(vars.len(), 4 + 12 + 4, "all three are trained");
            model.set_dropout_step(5).unwrap();
            let mixed = gradients(&loss(&model.forward(&ids(6)).unwrap()), &vars);

            let mut sums: Vec<Tensor> = vars.iter().map(|var| var.zeros_like().unwrap()).collect();
            for (row, name) in NAMES.iter().enumerate() {
                let names: Vec<&str> = name.iter().copied().collect();
                model.set_adapters(&names).unwrap();
                model.set_dropout_step(5).unwrap();
                let ys = model.forward(&ids(6)).unwrap();
                let row = gradients(&loss(&ys.get(row).unwrap()), &vars);
                for (sum, grad) in sums.iter_mut().zip(row) {
                    *sum = (&*sum + grad).unwrap();
                }
            }
            for (i, (got, want)) in mixed.iter().zip(&sums).enumerate() {
                let error = relative_error(got, want);
                assert!(
                    error < 1e-11,
                    "variable {i}, dropout {dropout} {position:?}: {error}"
                );
                assert!(to_vec(got).iter().any(|x| *x != 0.0));
            }
        }
    }
}

#[test]
fn several_adapters_learn_in_one_step() {
    use candle_nn::{AdamW, Optimizer};
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    adapters.set(&adapters.rows(&NAMES).unwrap()).unwrap();
    let mut optimizer = AdamW::new_lr(model.lora_vars().unwrap(), 0.02).unwrap();
    let target = lora_tests::randn(3, (6, 3, 5), DType::F32);
    let losses = |model: &Model| {
        let difference = (model.forward(&ids(6)).unwrap() - &target).unwrap();
        difference.sqr().unwrap().mean((1, 2)).unwrap()
    };
    let before = to_vec(&losses(&model));
    for _ in 0..30 {
        let grads = losses(&model).sum_all().unwrap().backward().unwrap();
        model.check_gradients(&grads).unwrap();
        optimizer.step(&grads).unwrap();
    }
    for ((name, before), after) in NAMES.iter().zip(&before).zip(to_vec(&losses(&model))) {
        match name {
            Some(name) => assert!(after < 0.9 * before, "{name}: {before} -> {after}"),
            None => assert_eq!(after, *before),
        }
    }
}

#[test]
fn a_batch_of_the_wrong_size_is_an_error_that_names_the_layer() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    let rows = adapters.rows(&NAMES[..4]).unwrap();
    let error = rows
        .scope(|| model.forward(&ids(6)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("layers.0.q_proj"), "{error}");
    assert!(error.contains("must be a multiple"), "{error}");
    // One adapter on every row is a batch too.
    let same = adapters.rows(&[Some("a"); 4]).unwrap();
    assert!(same.scope(|| model.forward(&ids(6))).is_err());
    assert!(message(adapters.rows(&[None::<&str>; 0])).contains("at least one row"));
}

#[test]
fn a_selected_batch_is_not_merged_nor_loses_an_adapter() {
    let mut model = Model::with_three(DType::F32);
    let adapters = model.adapters().unwrap();
    adapters.set(&adapters.rows(&NAMES).unwrap()).unwrap();
    let before = model.snapshot();
    assert!(message(model.merge()).contains("row by row"));
    assert!(message(model.delete_adapter("a")).contains("acts on rows"));
    assert_eq!(model.snapshot(), before);
    model.rename_adapter("a", "x").unwrap();
    assert_eq!(model.adapters().unwrap().active(), ["x", "b", "c"]);
    // While it is merged, a batch can't be run either.
    model.merge_adapters(&["b"]).unwrap();
    let rows = adapters.rows(&[Some("x"), None]).unwrap();
    let error = rows
        .scope(|| model.forward(&ids(2)))
        .unwrap_err()
        .to_string();
    assert!(error.contains("`unmerge`"), "{error}");
}
