//! Adapters with a bias of their own.

use candle_core::{DType, Module, Tensor, Var};
use lora_core::{LoraTargets, PeftConfig};
use lora_tests::{numeric_gradient, relative_error, to_vec};

use crate::model::{Model, ids};

fn config() -> PeftConfig {
    PeftConfig::all_linear().dim(3).alpha(4.5).lora_bias(true)
}

#[test]
fn a_bias_of_the_adapter_is_scaled_with_it() {
    let mut model = Model::new(DType::F64);
    let xs = lora_tests::randn(4, (5, 12), DType::F64);
    let base = model.layers[0].up_proj.forward(&xs).unwrap();
    model.add("a", &config());
    model.set_adapter("a").unwrap();
    let layer = &model.layers[0].up_proj;
    let lora = layer.lora().unwrap().adapter("a").unwrap();
    let hidden = xs.matmul(&lora.lora_a().t().unwrap()).unwrap();
    let delta = hidden.matmul(&lora.lora_b().t().unwrap()).unwrap();
    let delta = delta.broadcast_add(lora.lora_bias().unwrap()).unwrap();
    let want = (base + (delta * 1.5).unwrap()).unwrap();
    assert!(relative_error(&layer.forward(&xs).unwrap(), &want) < 1e-13);
}

#[test]
fn fused_and_composed_agree_and_the_bias_gets_its_gradient() {
    let build = |fused: bool| {
        let mut model = Model::new(DType::F64);
        model.add("a", &config().use_fused(fused));
        model.set_adapter("a").unwrap();
        let vars = model.adapter_vars("a").unwrap();
        (model, vars)
    };
    let loss =
        |model: &Model| -> candle_core::Result<Tensor> { model.forward(&ids(2))?.sqr()?.sum_all() };
    let (fused, fused_vars) = build(true);
    let (plain, plain_vars) = build(false);
    let grads = loss(&fused).unwrap().backward().unwrap();
    let plain_grads = loss(&plain).unwrap().backward().unwrap();
    let get = |grads: &candle_core::backprop::GradStore, var: &Var| grads.get(var).unwrap().clone();
    for (var, plain_var) in fused_vars.iter().zip(&plain_vars) {
        let (got, want) = (get(&grads, var), get(&plain_grads, plain_var));
        assert!(relative_error(&got, &want) < 1e-11);
        let numeric = numeric_gradient(var, || loss(&fused)).unwrap();
        assert!(relative_error(&got, &numeric) < 1e-6);
    }
}

#[test]
fn merging_puts_it_in_the_bias_also_where_there_was_none() {
    let mut model = Model::new(DType::F32);
    model.add("a", &config());
    model.add("b", &PeftConfig::new(["q_proj"]).dim(2));
    let want = model.sum_of(&["a", "b"], &ids(2));
    let bias = to_vec(model.layers[0].q_proj.bias().unwrap());
    model.merge().unwrap();
    assert!(relative_error(&model.forward(&ids(2)).unwrap(), &want) < 1e-5);
    assert!(model.layers[0].up_proj.bias().is_some());
    assert_ne!(to_vec(model.layers[0].q_proj.bias().unwrap()), bias);
    model.unmerge().unwrap();
    assert!(model.layers[0].up_proj.bias().is_none());
    assert_eq!(to_vec(model.layers[0].q_proj.bias().unwrap()), bias);
    assert_eq!(to_vec(&model.forward(&ids(2)).unwrap()), to_vec(&want));
}

#[test]
fn it_counts_among_the_parameters() {
    let mut model = Model::new(DType::F32);
    let report = model.add_adapter("a", &config()).unwrap();
    assert_eq!(report.trainable_parameters(), 4 * (3 * 24 + 12));
    let names: Vec<_> = model.named_adapter_vars("a").unwrap();
    assert!(
        names
            .iter()
            .any(|(name, _)| name == "layers.1.up_proj.lora_B.bias")
    );
    let exported = model.export_adapter("a").unwrap();
    assert!(exported.layers["layers.0.q_proj"].bias.is_some());
}
