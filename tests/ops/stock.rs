//! Why these ops exist: candle's own ones cut the gradient, these do not.

use candle_core::{DType, Module, Result, Tensor, Var};

use crate::oracle;

fn random(shape: &[usize], seed: u64) -> Tensor {
    // candle's fused norms have no f64.
    oracle::random(shape, seed).to_dtype(DType::F32).unwrap()
}

/// Whether a loss after `op` reaches the input of `op`.
fn trains(op: impl Fn(&Tensor) -> Result<Tensor>) -> bool {
    let xs = Var::from_tensor(&random(&[1, 2, 3, 4], 1)).unwrap();
    let loss = op(&xs).unwrap().sqr().unwrap().sum_all().unwrap();
    loss.backward().unwrap().get(&xs).is_some()
}

#[test]
fn candle_norms_cut_the_gradient_and_ours_do_not() {
    let (w, b) = (random(&[4], 2), random(&[4], 3));
    let stock = candle_nn::RmsNorm::new(w.clone(), 1e-5);
    let ours = lora_core::nn::RmsNorm::new(w.clone(), 1e-5);
    assert!(!trains(|xs| stock.forward(xs)));
    assert!(trains(|xs| ours.forward(xs)));
    assert!(trains(|xs| ours.forward_diff(xs)));

    let stock = candle_nn::LayerNorm::new(w.clone(), b.clone(), 1e-5);
    let ours = lora_core::nn::LayerNorm::new(w, b, 1e-5);
    assert!(!trains(|xs| stock.forward(xs)));
    assert!(trains(|xs| ours.forward(xs)));
}

#[test]
fn candle_softmax_last_dim_cuts_the_gradient_and_ours_does_not() {
    assert!(!trains(candle_nn::ops::softmax_last_dim));
    assert!(trains(lora_core::nn::softmax_last_dim));
}

#[test]
fn candle_ropes_cut_the_gradient_and_ours_do_not() {
    use {candle_nn::rotary_emb as stock, lora_core::nn};
    let (cos, sin) = (random(&[3, 2], 2), random(&[3, 2], 3));
    assert!(!trains(|xs| stock::rope(xs, &cos, &sin)));
    assert!(!trains(|xs| stock::rope_i(xs, &cos, &sin)));
    assert!(!trains(|xs| stock::rope_thd(xs, &cos, &sin)));
    assert!(trains(|xs| nn::rope(xs, &cos, &sin)));
    assert!(trains(|xs| nn::rope_i(xs, &cos, &sin)));
    assert!(trains(|xs| nn::rope_thd(xs, &cos, &sin)));
}
