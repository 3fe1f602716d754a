//! `softmax` and `softmax_last_dim`.

use candle_core::{D, DType, Device, Result, Tensor};
use lora_core::nn::{softmax, softmax_last_dim};

use crate::oracle::{
    assert_close, assert_gradients, assert_half_types, assert_same, random, strided,
    value_and_grads,
};

fn fused(args: &[Tensor]) -> Result<Tensor> {
    softmax_last_dim(&args[0])
}

fn slow(args: &[Tensor]) -> Result<Tensor> {
    let exp = args[0].exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

#[test]
fn softmax_equals_the_slow_composition() {
    for shape in [&[3, 7][..], &[1], &[2, 3, 65], &[70, 300]] {
        let xs = [random(shape, 1)];
        assert_same(&fused, &slow, &xs, DType::F64, 1e-14);
        assert_same(&fused, &slow, &xs, DType::F32, 1e-6);
    }
}

#[test]
fn softmax_over_any_dimension_equals_the_slow_composition() {
    let xs = [random(&[3, 4, 5], 1)];
    for dim in 0..3 {
        let ours = |args: &[Tensor]| softmax(&args[0], dim);
        let theirs = |args: &[Tensor]| slow(&[args[0].transpose(dim, 2)?])?.transpose(dim, 2);
        assert_same(&ours, &theirs, &xs, DType::F64, 1e-14);
    }
}

#[test]
fn softmax_gradients_are_central_differences() {
    assert_gradients(&fused, &[random(&[3, 35], 1)]);
}

#[test]
fn softmax_in_half_types_rounds_little() {
    // The gradient is made from the rounded result.
    assert_half_types(&fused, &[random(&[3, 35], 1)], 3.0);
}

#[test]
fn softmax_takes_any_strides_and_no_rows() {
    let turned = |args: &[Tensor]| softmax_last_dim(&strided(&args[0]));
    assert_same(&turned, &fused, &[random(&[3, 4, 5], 1)], DType::F64, 0.0);
    for shape in [[0, 4], [4, 0]] {
        let (ys, grads) = value_and_grads(&fused, &[random(&shape, 1)]);
        assert_eq!(ys.dims(), shape);
        assert_eq!(grads[0].dims(), shape);
    }
}

#[test]
fn softmax_of_large_and_masked_numbers_is_finite() {
    let xs = [1e30f32, f32::NEG_INFINITY, 1e30, -1e30];
    let ys = softmax_last_dim(&Tensor::new(&xs, &Device::Cpu).unwrap()).unwrap();
    let expected = Tensor::new(&[0.5f32, 0., 0.5, 0.], &Device::Cpu).unwrap();
    assert_close("softmax", &ys, &expected, 1e-6);
}

#[test]
fn softmax_of_a_scalar_or_of_integers_is_an_error() {
    assert!(softmax_last_dim(&Tensor::new(1f32, &Device::Cpu).unwrap()).is_err());
    let error = softmax_last_dim(&Tensor::new(&[1u32], &Device::Cpu).unwrap());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("U32"), "{error}");
}
