//! Training, disabling and merging an adapted model.

use candle_core::{DType, Module, Var};
use lora_core::{Error, LoraTargets, PeftConfig};
use lora_tests::{randn, relative_error, to_vec};

use crate::model::{Model, input};

#[test]
fn disabled_adapters_leave_the_base() {
    let mut model = Model::random(2, DType::F32);
    let xs = input(DType::F32);
    let base = to_vec(&model.forward(&xs).unwrap());
    model.apply_lora(&PeftConfig::all_linear()).unwrap();
    model.randomise();
    let adapted = to_vec(&model.forward(&xs).unwrap());
    assert_ne!(adapted, base);
    model.disable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&xs).unwrap()), base);
    model.enable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&xs).unwrap()), adapted);
}

#[test]
fn merging_keeps_the_output_and_unmerging_the_bits() {
    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 5e-2)] {
        let mut model = Model::random(2, dtype);
        let xs = input(dtype);
        model
            .apply_lora(&PeftConfig::all_linear().dim(3).alpha(1.0))
            .unwrap();
        model.randomise();
        let adapted = model.forward(&xs).unwrap();
        let before = model.snapshot();
        model.merge().unwrap();
        model.merge().unwrap();
        let error = relative_error(&model.forward(&xs).unwrap(), &adapted);
        assert!(error < bound, "{dtype:?}: {error}");
        model.unmerge().unwrap();
        assert_eq!(model.snapshot(), before);
        assert_eq!(to_vec(&model.forward(&xs).unwrap()), to_vec(&adapted));
    }
}

#[test]
fn adapters_without_a_gradient_are_named() {
    let mut model = Model::random(1, DType::F32);
    model
        .apply_lora(&PeftConfig::all_linear().exclude(["up_proj"]))
        .unwrap();
    let xs = input(DType::F32);
    let attention = &model.layers[0].self_attn;
    // The value's path is cut, as candle_nn's fused operations do.
    let loss = (attention.q_proj.forward(&xs).unwrap()
        * attention.v_proj.forward(&xs).unwrap().detach())
    .unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    let error = model.check_gradients(&grads).unwrap_err();
    let Error::NoGradient { missing, total } = &error else {
        panic!("{error}")
    };
    assert_eq!(*total, 4);
    let v = "model.layers.0.self_attn.v_proj";
    assert_eq!(
        *missing,
        [format!("{v}.lora_A.weight"), format!("{v}.lora_B.weight")]
    );
    assert!(error.to_string().contains("lora_core::nn"), "{error}");
}

#[test]
fn training_lowers_the_loss_and_leaves_the_base() {
    use candle_nn::Optimizer;
    let mut model = Model::random(2, DType::F32);
    let before = model.snapshot();
    model
        .apply_lora(&PeftConfig::all_linear().dim(4).alpha(8.0))
        .unwrap();
    let (xs, want) = (input(DType::F32), randn(5, (3, 4, 5), DType::F32));
    let loss = |model: &Model| (model.forward(&xs)? - &want)?.sqr()?.mean_all();
    let first = loss(&model).unwrap().to_scalar::<f32>().unwrap();
    let mut optimizer = candle_nn::AdamW::new_lr(model.lora_vars().unwrap(), 0.02).unwrap();
    for _ in 0..60 {
        let grads = loss(&model).unwrap().backward().unwrap();
        model.check_gradients(&grads).unwrap();
        optimizer.step(&grads).unwrap();
    }
    let last = loss(&model).unwrap().to_scalar::<f32>().unwrap();
    assert!(last < 0.5 * first, "{first} -> {last}");
    model.remove_adapters().unwrap();
    assert_eq!(model.snapshot(), before);
}

#[test]
fn a_half_base_trains_with_adapters_in_f32() {
    let mut model = Model::random(1, DType::BF16);
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    let vars: Vec<Var> = model.lora_vars().unwrap();
    assert!(vars.iter().all(|var| var.dtype() == DType::F32));
    let loss = model
        .forward(&input(DType::BF16))
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    assert!(
        vars.iter()
            .all(|var| grads.get(var).unwrap().dtype() == DType::F32)
    );

    let mut model = Model::random(1, DType::BF16);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).lora_dtype(DType::BF16))
        .unwrap();
    assert!(
        model
            .lora_vars()
            .unwrap()
            .iter()
            .all(|var| var.dtype() == DType::BF16)
    );
}
