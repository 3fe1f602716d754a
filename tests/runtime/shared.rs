//! Layers that run together on one input compute what they compute alone.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use lora_core::{
    DropoutPosition::{self, Post, Pre},
    PeftConfig,
    nn::{Linear, forward_shared},
    patch_linear_module,
};
use lora_tests::{numeric_gradient, randn, relative_error};

const INPUTS: usize = 9;
/// Output width and rank of each layer.
const LAYERS: [(usize, usize); 3] = [(7, 3), (4, 1), (11, 5)];

fn layers(dtype: DType, dropout: f64, position: DropoutPosition) -> lora_core::Result<[Linear; 3]> {
    let mut layers = Vec::new();
    for (i, (outputs, rank)) in LAYERS.into_iter().enumerate() {
        let weight = randn(i as u32, (outputs, INPUTS), dtype);
        let bias = (i != 1).then(|| randn(10 + i as u32, outputs, dtype));
        let mut layer = Linear::new(weight, bias);
        let config = PeftConfig::all_linear()
            .dim(rank)
            .alpha(1.7 * rank as f64)
            .dropout(dropout)
            .dropout_position(position);
        patch_linear_module(&format!("layers.{i}"), &mut layer, &config.adapter()?)?;
        let lora = layer.lora().expect("an adapter");
        let b = randn(20 + i as u32, (outputs, rank), lora.lora_b().dtype());
        lora.lora_b().set(&b)?;
        layers.push(layer);
    }
    Ok(layers.try_into().expect("three layers"))
}

fn together(layers: &[Linear; 3], xs: &Tensor) -> Result<Vec<Tensor>> {
    Ok(forward_shared([&layers[0], &layers[1], &layers[2]], xs)?.to_vec())
}

fn alone(layers: &[Linear; 3], xs: &Tensor) -> Result<Vec<Tensor>> {
    layers.iter().map(|layer| layer.forward(xs)).collect()
}

/// A loss that weighs every output by numbers of its own.
fn loss(outputs: &[Tensor]) -> Result<Tensor> {
    let mut sum = None;
    for (i, ys) in outputs.iter().enumerate() {
        let g = randn(30 + i as u32, ys.shape(), ys.dtype());
        let part = ys.mul(&g)?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    Ok(sum.expect("an output"))
}

/// Outputs, the gradient of `xs`, and those of every A and B.
fn run(
    layers: &[Linear; 3],
    xs: &Var,
    forward: fn(&[Linear; 3], &Tensor) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    for layer in layers {
        layer.lora().expect("an adapter").set_dropout_step(6);
    }
    let mut tensors = forward(layers, xs.as_tensor())?;
    let grads = loss(&tensors)?.backward()?;
    let grad = |var: &Var| grads.get(var).cloned().expect("a gradient");
    tensors.push(grad(xs));
    for lora in layers.iter().filter_map(Linear::lora) {
        tensors.extend([grad(lora.lora_a()), grad(lora.lora_b())]);
    }
    Ok(tensors)
}

fn assert_same(layers: &[Linear; 3], xs: &Tensor, tolerance: f64) -> Result<()> {
    let xs = Var::from_tensor(xs)?;
    let (together, alone) = (run(layers, &xs, together)?, run(layers, &xs, alone)?);
    assert_eq!(together.len(), 3 + 1 + 6);
    for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
        assert_eq!(together.dtype(), alone.dtype(), "tensor {i}");
        let error = relative_error(together, alone);
        assert!(error <= tolerance, "tensor {i}: {error}");
    }
    Ok(())
}

#[test]
fn outputs_and_gradients_are_those_of_each_layer_alone() -> lora_core::Result<()> {
    for (dtype, tolerance) in [
        (DType::F64, 1e-13),
        (DType::F32, 2e-6),
        (DType::F16, 2e-3),
        (DType::BF16, 1e-2),
    ] {
        let layers = layers(dtype, 0.0, Post)?;
        for shape in [vec![5], vec![2, 3], vec![1, 1, 4], vec![0], vec![]] {
            let xs = randn(40, [shape, vec![INPUTS]].concat(), dtype);
            assert_same(&layers, &xs, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn dropout_on_outputs_draws_the_masks_of_each_layer_alone() -> lora_core::Result<()> {
    let xs = randn(41, (6, INPUTS), DType::F64);
    assert_same(&layers(DType::F64, 0.4, Post)?, &xs, 1e-13)?;
    Ok(())
}

#[test]
fn layers_with_dropout_on_the_input_run_alone() -> lora_core::Result<()> {
    let xs = randn(42, (6, INPUTS), DType::F64);
    assert_same(&layers(DType::F64, 0.4, Pre)?, &xs, 1e-13)?;
    Ok(())
}

#[test]
fn plain_disabled_and_merged_layers_may_stand_among_adapted_ones() -> lora_core::Result<()> {
    let xs = randn(43, (6, INPUTS), DType::F32);
    for odd in 0..3 {
        let mut layers = layers(DType::F32, 0.0, Post)?;
        match odd {
            0 => drop(layers[1].remove_adapter()),
            1 => layers[1].lora_mut().expect("an adapter").set_enabled(false),
            _ => layers[1].merge()?,
        }
        for (together, alone) in together(&layers, &xs)?.iter().zip(alone(&layers, &xs)?) {
            assert!(relative_error(together, &alone) <= 1e-6);
        }
    }
    Ok(())
}

#[test]
fn inputs_need_not_be_contiguous() -> lora_core::Result<()> {
    let layers = layers(DType::F64, 0.0, Post)?;
    let wide = Var::from_tensor(&randn(44, (INPUTS, 3, 4), DType::F64))?;
    let gradient = |forward: fn(&[Linear; 3], &Tensor) -> Result<Vec<Tensor>>| {
        let xs = wide.permute((2, 1, 0))?;
        assert!(!xs.is_contiguous());
        let grads = loss(&forward(&layers, &xs)?)?.backward()?;
        Ok::<_, candle_core::Error>(grads.get(&wide).cloned().expect("a gradient"))
    };
    assert!(relative_error(&gradient(together)?, &gradient(alone)?) <= 1e-13);
    Ok(())
}

#[test]
fn gradients_are_those_of_differences() -> lora_core::Result<()> {
    let layers = layers(DType::F64, 0.3, Post)?;
    let xs = Var::from_tensor(&randn(45, (4, INPUTS), DType::F64))?;
    let vars: Vec<Var> = layers
        .iter()
        .filter_map(Linear::lora)
        .flat_map(|lora| [lora.lora_a().clone(), lora.lora_b().clone()])
        .chain([xs.clone()])
        .collect();
    let value = || {
        for lora in layers.iter().filter_map(Linear::lora) {
            lora.set_dropout_step(2);
        }
        loss(&together(&layers, xs.as_tensor())?)
    };
    let grads = value()?.backward()?;
    for var in &vars {
        let got = grads.get(var).expect("a gradient");
        let error = relative_error(got, &numeric_gradient(var, value)?);
        assert!(error < 1e-8, "{error}");
    }
    Ok(())
}

#[test]
fn frozen_weights_get_no_gradient_and_an_untracked_input_none_either() -> lora_core::Result<()> {
    let layers = layers(DType::F32, 0.0, Post)?;
    let xs = randn(46, (4, INPUTS), DType::F32);
    let grads = loss(&together(&layers, &xs)?)?.backward()?;
    assert!(grads.get(&xs).is_none());
    for layer in &layers {
        assert!(grads.get(layer.weight()).is_none());
    }
    Ok(())
}

#[test]
fn a_wrong_input_names_the_layer() -> lora_core::Result<()> {
    let layers = layers(DType::F32, 0.0, Post)?;
    for xs in [
        Tensor::zeros((2, INPUTS + 1), DType::F32, &Device::Cpu)?,
        Tensor::zeros((2, INPUTS), DType::F64, &Device::Cpu)?,
        Tensor::zeros((), DType::F32, &Device::Cpu)?,
    ] {
        let error = together(&layers, &xs)
            .expect_err("a wrong input")
            .to_string();
        assert!(error.starts_with("layers.0: the input is"), "{error}");
    }
    Ok(())
}
