//! `RmsNorm` and `LayerNorm`.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarBuilder;
use lora_core::nn::{
    LayerNorm, LayerNormConfig, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm,
};

use crate::oracle::{
    Op, assert_close, assert_gradients, assert_half_types, assert_same, random, randoms, strided,
    value_and_grads,
};

const EPS: f64 = 1e-3;

fn rms(args: &[Tensor]) -> Result<Tensor> {
    RmsNorm::new(args[1].clone(), EPS).forward(&args[0])
}

fn layer(args: &[Tensor]) -> Result<Tensor> {
    LayerNorm::new(args[1].clone(), args[2].clone(), EPS).forward(&args[0])
}

fn layer_no_bias(args: &[Tensor]) -> Result<Tensor> {
    LayerNorm::new_no_bias(args[1].clone(), EPS).forward(&args[0])
}

fn rms_slow(args: &[Tensor]) -> Result<Tensor> {
    let mean_square = args[0].sqr()?.mean_keepdim(D::Minus1)?;
    let xs = args[0].broadcast_div(&(mean_square + EPS)?.sqrt()?)?;
    xs.broadcast_mul(&args[1])
}

fn layer_no_bias_slow(args: &[Tensor]) -> Result<Tensor> {
    let xs = args[0].broadcast_sub(&args[0].mean_keepdim(D::Minus1)?)?;
    rms_slow(&[xs, args[1].clone()])
}

fn layer_slow(args: &[Tensor]) -> Result<Tensor> {
    layer_no_bias_slow(args)?.broadcast_add(&args[2])
}

/// Every norm, its slow twin and how many tensors it takes.
const NORMS: [(Op, Op, usize); 3] = [
    (&rms, &rms_slow, 2),
    (&layer_no_bias, &layer_no_bias_slow, 2),
    (&layer, &layer_slow, 3),
];

#[test]
fn norms_equal_the_slow_composition() {
    for (fused, slow, args) in NORMS {
        // Odd sizes; one row; enough rows for several threads.
        for shape in [&[5, 7][..], &[1, 33], &[2, 3, 65], &[90, 576], &[1]] {
            let n = shape[shape.len() - 1];
            let inputs = &randoms(&[shape, &[n], &[n]])[..args];
            assert_same(fused, slow, inputs, DType::F64, 1e-12);
            assert_same(fused, slow, inputs, DType::F32, 2e-5);
        }
    }
}

#[test]
fn norm_gradients_are_central_differences() {
    for (fused, _, args) in NORMS {
        assert_gradients(fused, &randoms(&[&[3, 37], &[37], &[37]])[..args]);
    }
}

#[test]
fn norms_in_half_types_round_once() {
    for (fused, _, args) in NORMS {
        assert_half_types(fused, &randoms(&[&[4, 50], &[50], &[50]])[..args], 1.0);
    }
}

#[test]
fn norms_take_any_strides() {
    for (fused, _, args) in NORMS {
        let inputs = &randoms(&[&[6, 2, 9], &[9], &[9]])[..args];
        let turned = |args: &[Tensor]| {
            let mut args = args.to_vec();
            args[0] = strided(&args[0]);
            fused(&args)
        };
        assert_same(&turned, fused, inputs, DType::F64, 0.0);
    }
}

#[test]
fn norms_of_no_rows_are_empty() {
    for (fused, _, args) in NORMS {
        let (ys, grads) = value_and_grads(fused, &randoms(&[&[0, 4], &[4], &[4]])[..args]);
        assert_eq!(ys.dims(), [0, 4]);
        assert_eq!(grads[0].dims(), [0, 4]);
        assert_close(
            "dw",
            &grads[1],
            &Tensor::zeros(4, DType::F64, &Device::Cpu).unwrap(),
            0.0,
        );
    }
}

#[test]
fn a_frozen_scale_gets_no_gradient_and_a_tracked_one_does() {
    for (fused, _, args) in NORMS {
        for tracked in 0..1 << args {
            let vars: Vec<Var> = (randoms(&[&[3, 5], &[5], &[5]])[..args].iter())
                .map(|xs| Var::from_tensor(xs).unwrap())
                .collect();
            let inputs: Vec<Tensor> = (vars.iter().enumerate())
                .map(|(i, var)| match tracked >> i & 1 {
                    1 => var.as_tensor().clone(),
                    _ => var.as_detached_tensor(),
                })
                .collect();
            let loss = fused(&inputs).unwrap().sqr().unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            for (i, input) in inputs.iter().enumerate() {
                assert_eq!(
                    grads.get(input).is_some(),
                    tracked >> i & 1 == 1,
                    "input {i}"
                );
            }
        }
    }
}

#[test]
fn a_norm_of_the_wrong_size_names_the_shapes() {
    let xs = random(&[2, 4], 1);
    let error = rms(&[xs.clone(), random(&[3], 2)]).unwrap_err().to_string();
    assert!(error.contains("[2, 4]") && error.contains("[3]"), "{error}");
    let error = layer(&[xs.clone(), random(&[4], 2), random(&[5], 3)]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("[4]") && error.contains("[5]"), "{error}");
    let half = random(&[4], 2).to_dtype(DType::BF16).unwrap();
    let error = rms(&[xs, half]).unwrap_err().to_string();
    assert!(error.contains("F64") && error.contains("BF16"), "{error}");
}

#[test]
fn constructors_read_the_builder_and_remember_its_prefix() {
    let tensors = [
        ("a.weight", 1),
        ("a.bias", 2),
        ("old.gamma", 3),
        ("old.beta", 4),
    ]
    .map(|(name, seed)| (name.to_owned(), random(&[6], seed)));
    let tensors = HashMap::from(tensors);
    let vb = VarBuilder::from_tensors(tensors.clone(), DType::F64, &Device::Cpu);

    let norm = rms_norm(6, EPS, vb.pp("a")).unwrap();
    assert_eq!(norm.path(), Some("a"));
    assert_eq!(norm.eps(), EPS);
    assert_close("weight", norm.weight(), &tensors["a.weight"], 0.0);

    let norm = layer_norm(6, LayerNormConfig::default(), vb.pp("old")).unwrap();
    assert_eq!(norm.path(), Some("old"));
    assert_close("gamma", norm.weight(), &tensors["old.gamma"], 0.0);
    assert_close("beta", norm.bias().unwrap(), &tensors["old.beta"], 0.0);

    let norm = layer_norm_no_bias(6, EPS, vb.pp("a")).unwrap();
    assert!(norm.bias().is_none() && norm.remove_mean());
    assert_eq!(RmsNorm::new(random(&[6], 1), EPS).path(), None);

    let error = rms_norm(6, EPS, vb.pp("none")).unwrap_err().to_string();
    assert!(error.contains("none.weight"), "{error}");
}
