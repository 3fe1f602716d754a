//! The adapted linear layer against the plain composition, differences and the base.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use lora_core::{
    DropoutPosition::{self, Post, Pre},
    LinearLoRA, PeftConfig,
    nn::Linear,
    patch_linear_module,
};
use lora_tests::{numeric_gradient, randn, relative_error, to_vec};

/// A layer with a random adapter: B is not zero, alpha / rank is not one.
struct Case {
    tokens: Vec<usize>,
    inputs: usize,
    outputs: usize,
    rank: usize,
    bias: bool,
    dropout: Option<(f64, DropoutPosition)>,
}

impl Case {
    fn new(tokens: &[usize], inputs: usize, outputs: usize, rank: usize) -> Self {
        Self {
            tokens: tokens.to_vec(),
            inputs,
            outputs,
            rank,
            bias: true,
            dropout: None,
        }
    }

    fn layer(&self, dtype: DType, fused: bool) -> lora_core::Result<LinearLoRA> {
        let mut config = PeftConfig::all_linear()
            .dim(self.rank)
            .alpha(1.7 * self.rank as f64);
        if let Some((p, position)) = self.dropout {
            config = config.dropout(p).dropout_position(position);
        }
        let config = config.use_fused(fused).seed(3).adapter()?;
        let weight = randn(1, (self.outputs, self.inputs), dtype);
        let bias = self.bias.then(|| randn(2, self.outputs, dtype));
        let layer = LinearLoRA::new("layers.7.proj", weight, bias, &config)?;
        let b = randn(5, (self.outputs, self.rank), layer.lora_b().dtype());
        layer.lora_b().set(&b)?;
        Ok(layer)
    }

    fn input(&self, dtype: DType) -> Tensor {
        let mut shape = self.tokens.clone();
        shape.push(self.inputs);
        randn(9, shape, dtype)
    }

    fn output_weights(&self, dtype: DType) -> Tensor {
        let mut shape = self.tokens.clone();
        shape.push(self.outputs);
        randn(11, shape, dtype)
    }
}

/// `[ys, dxs, dA, dB]` for the loss `Σ ys · g`.
fn run(layer: &LinearLoRA, xs: &Tensor, g: &Tensor) -> Result<[Tensor; 4]> {
    let xs = Var::from_tensor(xs)?;
    layer.set_dropout_step(4);
    let ys = layer.forward(xs.as_tensor())?;
    let grads = ys.mul(g)?.sum_all()?.backward()?;
    let grad = |var: &Var| grads.get(var).cloned().expect("a gradient");
    Ok([
        ys.clone(),
        grad(&xs),
        grad(layer.lora_a()),
        grad(layer.lora_b()),
    ])
}

fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(&[5], 7, 11, 3),
        Case::new(&[1], 8, 8, 1),
        Case::new(&[2, 3], 16, 5, 4),
        Case::new(&[2, 1, 3], 9, 33, 8),
        Case::new(&[], 6, 4, 2),
        Case::new(&[4], 3, 2, 13),
    ];
    cases.push(Case {
        bias: false,
        ..Case::new(&[17], 130, 65, 6)
    });
    for position in [Pre, Post] {
        cases.push(Case {
            dropout: Some((0.3, position)),
            ..Case::new(&[3, 5], 10, 13, 5)
        });
        cases.push(Case {
            dropout: Some((0.5, position)),
            ..Case::new(&[65], 37, 21, 7)
        });
    }
    cases
}

#[test]
fn fused_equals_composition() -> anyhow::Result<()> {
    let bounds = [
        (DType::F64, 1e-13),
        (DType::F32, 2e-6),
        (DType::BF16, 8e-3),
        (DType::F16, 1e-3),
    ];
    for case in cases() {
        for (dtype, bound) in bounds {
            let (xs, g) = (case.input(dtype), case.output_weights(dtype));
            let fused = run(&case.layer(dtype, true)?, &xs, &g)?;
            let plain = run(&case.layer(dtype, false)?, &xs, &g)?;
            for (name, (fused, plain)) in
                ["y", "dx", "dA", "dB"].iter().zip(fused.iter().zip(&plain))
            {
                let error = relative_error(fused, plain);
                assert!(
                    error <= bound,
                    "{name} of {dtype:?}, {:?}: {error}",
                    case.tokens
                );
                assert_eq!(fused.dtype(), plain.dtype(), "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_differences() -> anyhow::Result<()> {
    for case in cases().into_iter().filter(|case| case.inputs < 30) {
        let layer = case.layer(DType::F64, true)?;
        let (xs, g) = (case.input(DType::F64), case.output_weights(DType::F64));
        let [_, dxs, da, db] = run(&layer, &xs, &g)?;
        let xs = Var::from_tensor(&xs)?;
        let loss = || {
            layer.set_dropout_step(4);
            layer.forward(xs.as_tensor())?.mul(&g)?.sum_all()
        };
        for (name, var, got) in [
            ("dx", &xs, dxs),
            ("dA", layer.lora_a(), da),
            ("dB", layer.lora_b(), db),
        ] {
            let error = relative_error(&got, &numeric_gradient(var, loss)?);
            assert!(error < 1e-8, "{name} of {:?}: {error}", case.tokens);
        }
    }
    Ok(())
}

#[test]
fn any_strides_give_the_same() -> anyhow::Result<()> {
    let case = Case::new(&[6, 4], 10, 7, 3);
    let layer = case.layer(DType::F32, true)?;
    let g = case.output_weights(DType::F32);
    let want = run(&layer, &case.input(DType::F32), &g)?;
    let wide = Tensor::cat(
        &[randn(1, (6, 4, 3), DType::F32), case.input(DType::F32)],
        2,
    )?;
    let views = [
        case.input(DType::F32)
            .transpose(0, 1)?
            .contiguous()?
            .transpose(0, 1)?,
        wide.narrow(2, 3, 10)?,
        case.input(DType::F32).t()?.contiguous()?.t()?,
    ];
    for xs in views {
        assert!(!xs.is_contiguous());
        // A variable is contiguous, so that the view is taken inside the graph.
        let ys = layer.forward(&xs)?;
        assert_eq!(to_vec(&ys), to_vec(&want[0]));
        let grads = ys.mul(&g)?.sum_all()?.backward()?;
        assert_eq!(to_vec(grads.get(layer.lora_a()).unwrap()), to_vec(&want[2]));
        assert_eq!(to_vec(grads.get(layer.lora_b()).unwrap()), to_vec(&want[3]));
    }
    Ok(())
}

#[test]
fn an_empty_batch_gives_zero_gradients() -> anyhow::Result<()> {
    for dropout in [None, Some((0.5, Pre)), Some((0.5, Post))] {
        let case = Case {
            dropout,
            ..Case::new(&[2, 0], 6, 4, 3)
        };
        let layer = case.layer(DType::F32, true)?;
        let [ys, dxs, da, db] = run(
            &layer,
            &case.input(DType::F32),
            &case.output_weights(DType::F32),
        )?;
        assert_eq!(ys.dims(), [2, 0, 4]);
        assert_eq!(dxs.dims(), [2, 0, 6]);
        assert_eq!(to_vec(&da), [0.0; 18]);
        assert_eq!(to_vec(&db), [0.0; 12]);
    }
    Ok(())
}

#[test]
fn a_fresh_adapter_changes_no_bit() -> anyhow::Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for bias in [true, false] {
            let (weight, bias) = (randn(1, (33, 20), dtype), bias.then(|| randn(2, 33, dtype)));
            let xs = randn(3, (2, 5, 20), dtype);
            let want = candle_nn::Linear::new(weight.clone(), bias.clone()).forward(&xs)?;
            let mut linear = Linear::new(weight, bias);
            assert_eq!(
                to_vec(&linear.forward(&xs)?),
                to_vec(&want),
                "{dtype:?} plain"
            );
            let config = PeftConfig::all_linear().dim(4).alpha(6.0).adapter()?;
            patch_linear_module("proj", &mut linear, &config)?;
            assert_eq!(
                to_vec(&linear.forward(&xs)?),
                to_vec(&want),
                "{dtype:?} adapted"
            );
        }
    }
    Ok(())
}

#[test]
fn a_plain_linear_is_candles_bit_for_bit_also_in_training() -> anyhow::Result<()> {
    for dims in [vec![20], vec![7, 20], vec![3, 7, 20], vec![2, 3, 7, 20]] {
        let (weight, bias) = (randn(1, (33, 20), DType::F32), randn(2, 33, DType::F32));
        let candles = candle_nn::Linear::new(weight.clone(), Some(bias.clone()));
        let ours = Linear::new(weight.clone(), Some(bias));
        let xs = Var::from_tensor(&randn(3, dims.clone(), DType::F32))?;
        if dims.len() == 1 {
            assert!(candles.forward(&xs).is_err(), "candle takes no vector");
            assert_eq!(ours.forward(&xs)?.dims(), [33]);
            continue;
        }
        let (want, got) = (candles.forward(&xs)?, ours.forward(&xs)?);
        assert_eq!(to_vec(&got), to_vec(&want));
        let want = want.sqr()?.sum_all()?.backward()?;
        let got = got.sqr()?.sum_all()?.backward()?;
        assert_eq!(
            to_vec(got.get(&xs).unwrap()),
            to_vec(want.get(&xs).unwrap())
        );
        assert!(want.get(&weight).is_some() || want.get(&weight.t()?).is_none());
        assert!(got.get(&weight).is_none());
    }
    Ok(())
}

#[test]
fn a_plain_linear_with_a_trained_weight_trains() -> anyhow::Result<()> {
    let weight = Var::from_tensor(&randn(1, (3, 4), DType::F64))?;
    let linear = Linear::new(weight.as_tensor().clone(), None);
    let xs = randn(2, (5, 4), DType::F64);
    let loss = || linear.forward(&xs)?.sqr()?.sum_all();
    let grads = loss()?.backward()?;
    let error = relative_error(
        grads.get(&weight).unwrap(),
        &numeric_gradient(&weight, loss)?,
    );
    assert!(error < 1e-8, "{error}");
    Ok(())
}

#[test]
fn an_untracked_input_gets_no_gradient() -> anyhow::Result<()> {
    let case = Case::new(&[5], 7, 11, 3);
    let layer = case.layer(DType::F32, true)?;
    let xs = case.input(DType::F32);
    let grads = layer.forward(&xs)?.sum_all()?.backward()?;
    assert!(grads.get(&xs).is_none());
    assert!(grads.get(layer.weight()).is_none());
    assert_eq!(grads.get_ids().count(), 2, "A and B alone");
    Ok(())
}

#[test]
fn dropout_acts_in_training_only_and_differs_by_step_and_position() -> anyhow::Result<()> {
    let outputs = |position, training, step| -> anyhow::Result<Vec<f64>> {
        let case = Case {
            dropout: Some((0.5, position)),
            ..Case::new(&[8], 12, 9, 4)
        };
        let mut layer = case.layer(DType::F32, true)?;
        layer.set_training(training);
        layer.set_dropout_step(step);
        Ok(to_vec(&layer.forward(&case.input(DType::F32))?))
    };
    assert_eq!(outputs(Pre, true, 0)?, outputs(Pre, true, 0)?);
    assert_ne!(outputs(Pre, true, 0)?, outputs(Pre, true, 1)?);
    assert_ne!(outputs(Pre, true, 0)?, outputs(Post, true, 0)?);
    assert_eq!(outputs(Pre, false, 0)?, outputs(Post, false, 1)?);
    assert_ne!(outputs(Pre, true, 0)?, outputs(Pre, false, 0)?);
    Ok(())
}

#[test]
fn two_forward_passes_draw_two_masks_and_each_backward_its_own() -> anyhow::Result<()> {
    let case = Case {
        dropout: Some((0.5, Pre)),
        ..Case::new(&[8], 12, 9, 4)
    };
    let layer = case.layer(DType::F64, true)?;
    let xs = case.input(DType::F64);
    layer.set_dropout_step(0);
    let (first, second) = (layer.forward(&xs)?, layer.forward(&xs)?);
    assert_ne!(to_vec(&first), to_vec(&second));
    let both = (first.sum_all()? + second.sum_all()?)?.backward()?;
    let mut sum = Tensor::zeros_like(layer.lora_a())?;
    for step in [0, 1] {
        layer.set_dropout_step(step);
        let grads = layer.forward(&xs)?.sum_all()?.backward()?;
        sum = (sum + grads.get(layer.lora_a()).unwrap())?;
    }
    assert!(relative_error(both.get(layer.lora_a()).unwrap(), &sum) < 1e-12);
    Ok(())
}

#[test]
fn merged_equals_forward() -> anyhow::Result<()> {
    for (dtype, bound) in [
        (DType::F64, 1e-14),
        (DType::F32, 1e-6),
        (DType::BF16, 1e-2),
        (DType::F16, 2e-3),
    ] {
        let case = Case::new(&[9], 31, 17, 5);
        let layer = case.layer(dtype, true)?;
        let xs = case.input(dtype);
        let merged = candle_nn::Linear::new(layer.merged_weight()?, layer.bias().cloned());
        let error = relative_error(&merged.forward(&xs)?, &layer.forward(&xs)?);
        assert!(error <= bound, "{dtype:?}: {error}");
    }
    Ok(())
}

#[test]
fn unmerge_restores_every_bit() -> anyhow::Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let case = Case::new(&[9], 31, 17, 5);
        let lora = case.layer(dtype, true)?;
        let (weight, xs) = (lora.weight().clone(), case.input(dtype));
        let mut linear = Linear::new(weight.clone(), lora.bias().cloned());
        let config = PeftConfig::all_linear().dim(5).alpha(8.5).adapter()?;
        patch_linear_module("proj", &mut linear, &config)?;
        linear.lora().unwrap().lora_b().set(lora.lora_b())?;
        let before = to_vec(&linear.forward(&xs)?);
        linear.merge()?;
        assert!(linear.is_merged());
        assert_ne!(to_vec(linear.weight()), to_vec(&weight));
        linear.unmerge();
        assert_eq!(to_vec(linear.weight()), to_vec(&weight));
        assert_eq!(to_vec(&linear.forward(&xs)?), before);
    }
    Ok(())
}

#[test]
fn errors_name_the_layer() {
    let layer = Case::new(&[5], 7, 11, 3).layer(DType::F32, true).unwrap();
    let wrong_width = layer
        .forward(&randn(1, (5, 8), DType::F32))
        .unwrap_err()
        .to_string();
    assert!(
        wrong_width.contains("layers.7.proj") && wrong_width.contains("[.., 7]"),
        "{wrong_width}"
    );
    let wrong_type = layer
        .forward(&randn(1, (5, 7), DType::F64))
        .unwrap_err()
        .to_string();
    assert!(
        wrong_type.contains("layers.7.proj") && wrong_type.contains("f64"),
        "{wrong_type}"
    );
    let scalar = layer.forward(&Tensor::new(1f32, &Device::Cpu).unwrap());
    assert!(scalar.is_err());

    let config = PeftConfig::all_linear().adapter().unwrap();
    let weight = Tensor::zeros((2, 3), DType::U8, &Device::Cpu).unwrap();
    let integer = LinearLoRA::new("a.b", weight, None, &config)
        .unwrap_err()
        .to_string();
    assert_eq!(integer, "a.b: a base of u8 can't be adapted");
    let weight = randn(1, (2, 3, 4), DType::F32);
    let cube = LinearLoRA::new("a.b", weight, None, &config)
        .unwrap_err()
        .to_string();
    assert!(
        cube.starts_with("a.b: the weight has shape [2, 3, 4]"),
        "{cube}"
    );
}

#[test]
fn the_compute_path_is_told() -> lora_core::Result<()> {
    let case = Case::new(&[5], 7, 11, 3);
    let path = |fused| -> lora_core::Result<String> {
        let layer = case.layer(DType::F32, fused)?;
        Ok(layer.compute_path(&case.input(DType::F32))?.to_string())
    };
    assert_eq!(path(true)?, "fused");
    assert_eq!(path(false)?, "composed: use_fused is off");
    let layer = case.layer(DType::F32, true)?;
    assert!(layer.compute_path(&randn(1, (5, 8), DType::F32)).is_err());
    Ok(())
}
