//! `swiglu` and `silu`.

use candle_core::{DType, Device, Result, Tensor, Var};
use lora_core::nn::{silu, swiglu};

use crate::oracle::{
    assert_close, assert_gradients, assert_half_types, assert_same, random, randoms, strided,
    value_and_grads,
};

fn fused(args: &[Tensor]) -> Result<Tensor> {
    swiglu(&args[0], &args[1])
}

fn slow(args: &[Tensor]) -> Result<Tensor> {
    let sigmoid = (args[0].neg()?.exp()? + 1.0)?.recip()?;
    &(&args[0] * sigmoid)? * &args[1]
}

#[test]
fn swiglu_equals_the_slow_composition() {
    for shape in [&[3, 7][..], &[1], &[2, 3, 65], &[30, 1536]] {
        let inputs = randoms(&[shape, shape]);
        assert_same(&fused, &slow, &inputs, DType::F64, 1e-14);
        assert_same(&fused, &slow, &inputs, DType::F32, 1e-6);
    }
}

#[test]
fn swiglu_gradients_are_central_differences() {
    assert_gradients(&fused, &randoms(&[&[3, 7], &[3, 7]]));
    assert_gradients(&|args| silu(&args[0]), &[random(&[3, 7], 1)]);
}

#[test]
fn swiglu_in_half_types_rounds_once() {
    assert_half_types(&fused, &randoms(&[&[3, 35], &[3, 35]]), 1.0);
}

#[test]
fn swiglu_takes_any_strides_and_no_rows() {
    let turned = |args: &[Tensor]| swiglu(&strided(&args[0]), &strided(&args[1]));
    let inputs = randoms(&[&[3, 4, 5], &[3, 4, 5]]);
    assert_same(&turned, &fused, &inputs, DType::F64, 0.0);
    let (ys, grads) = value_and_grads(&fused, &randoms(&[&[0, 4], &[0, 4]]));
    assert_eq!(ys.dims(), [0, 4]);
    assert_eq!(grads[1].dims(), [0, 4]);
}

#[test]
fn swiglu_of_large_numbers_is_finite() {
    let gate = Tensor::new(&[1e4f32, -1e4, 0.], &Device::Cpu).unwrap();
    let ys = swiglu(&gate, &gate.ones_like().unwrap()).unwrap();
    let expected = Tensor::new(&[1e4f32, 0., 0.], &Device::Cpu).unwrap();
    assert_close("swiglu", &ys, &expected, 0.0);
}

#[test]
fn only_the_tracked_input_gets_a_gradient() {
    let gate = Var::from_tensor(&random(&[3, 4], 1)).unwrap();
    let up = random(&[3, 4], 2);
    let grads = swiglu(&gate, &up)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(grads.get(&gate).is_some());
    assert!(grads.get(&up).is_none());
}

#[test]
fn inputs_that_differ_are_an_error() {
    let error = swiglu(&random(&[3, 4], 1), &random(&[4, 3], 2))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("[3, 4]") && error.contains("[4, 3]"),
        "{error}"
    );
}
