//! Whole models: the layers around the adapters, and training.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use lora_core::{
    LoraTargets, PeftConfig,
    nn::{self, causal_lm_loss},
};
use lora_examples::{hf_folder::HfFolder, model::CausalLm, weights::var_builder};
use lora_tests::{randn, relative_error};

use crate::card;

/// The function's value and the gradients of its inputs, on the CPU.
fn value_and_gradients(
    inputs: &[Tensor],
    device: &Device,
    function: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|input| Var::from_tensor(&input.to_device(device)?))
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let ys = function(&tensors)?;
    let g = randn(99, ys.shape(), ys.dtype()).to_device(device)?;
    let grads = ys.mul(&g)?.sum_all()?.backward()?;
    let mut all = vec![ys.to_device(&Device::Cpu)?];
    for var in &vars {
        all.push(
            grads
                .get(var)
                .expect("a gradient")
                .to_device(&Device::Cpu)?,
        );
    }
    Ok(all)
}

#[test]
fn the_differentiable_layers_agree_with_the_cpu() -> Result<()> {
    let Some(card) = card() else { return Ok(()) };
    type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;
    let x = |seed, shape: &[usize]| randn(seed, shape, DType::F32);
    let cases: Vec<(&str, Vec<Tensor>, Function)> = vec![
        (
            "rms_norm",
            vec![x(1, &[5, 24]), x(2, &[24])],
            Box::new(|t| nn::RmsNorm::new(t[1].clone(), 1e-5).forward(&t[0])),
        ),
        (
            "layer_norm",
            vec![x(1, &[5, 24]), x(2, &[24]), x(3, &[24])],
            Box::new(|t| nn::LayerNorm::new(t[1].clone(), t[2].clone(), 1e-5).forward(&t[0])),
        ),
        (
            "softmax_last_dim",
            vec![x(1, &[3, 5, 7])],
            Box::new(|t| nn::softmax_last_dim(&t[0])),
        ),
        (
            "swiglu",
            vec![x(1, &[5, 24]), x(2, &[5, 24])],
            Box::new(|t| nn::swiglu(&t[0], &t[1])),
        ),
        (
            "rope_thd",
            vec![x(1, &[1, 5, 3, 8])],
            Box::new(|t| {
                let angles = randn(4, (5, 4), DType::F32).to_device(t[0].device())?;
                nn::rope_thd(&t[0], &angles.cos()?, &angles.sin()?)
            }),
        ),
        (
            "causal_attention",
            vec![x(1, &[9, 4, 8]), x(2, &[9, 2, 8]), x(3, &[9, 2, 8])],
            Box::new(|t| nn::causal_attention(&t[0], &t[1], &t[2], &[4, 5], &[4, 5], 0.3)),
        ),
        (
            "cross_entropy",
            vec![x(1, &[4, 11])],
            Box::new(|t| {
                nn::cross_entropy(&t[0], &Tensor::new(&[3_u32, 1, 10, 0], t[0].device())?)
            }),
        ),
    ];
    for (name, inputs, function) in &cases {
        let cpu = value_and_gradients(inputs, &Device::Cpu, function)?;
        let got = value_and_gradients(inputs, &card, function)?;
        for (i, (got, want)) in got.iter().zip(&cpu).enumerate() {
            let error = relative_error(got, want);
            assert!(error < 1e-5, "{name}, tensor {i}: {error}");
        }
    }
    Ok(())
}

/// The losses of a training run of the golden model.
fn train(device: &Device, dtype: DType, steps: usize) -> lora_core::Result<Vec<f32>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/llama/untied");
    let config = HfFolder::read_config(&folder).expect("a configuration");
    let weights = Arc::new(HfFolder::open(&folder).expect("weights"));
    let mut model = CausalLm::new(&config, var_builder(weights, dtype, device)).expect("a model");
    let adapters = PeftConfig::all_linear()
        .dim(4)
        .alpha(8.0)
        .dropout(0.1)
        .seed(1);
    model.apply_lora(&adapters)?;
    let params = ParamsAdamW {
        lr: 2e-3,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(model.lora_vars()?, params)?;
    let mut losses = Vec::with_capacity(steps);
    for step in 0..steps {
        let numbers = (0..24).map(|i| (i * 7 + step % 5 * 3 + i * i) as u32 % 10);
        let numbers: Vec<u32> = numbers.collect();
        let labels: Vec<i64> = numbers.iter().map(|&n| i64::from(n)).collect();
        let lengths = [10, 14];
        let hidden = model.hidden_states(&Tensor::new(numbers, device)?, &lengths)?;
        let loss = causal_lm_loss(&hidden, |xs| model.logits(xs), &labels, &lengths, -100)?;
        losses.push(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        let grads = loss.backward()?;
        model.check_gradients(&grads)?;
        optimizer.step(&grads)?;
    }
    Ok(losses)
}

#[test]
fn two_hundred_steps_on_card_and_cpu_have_the_same_losses() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let (cpu, card) = (
        train(&Device::Cpu, DType::F32, 200)?,
        train(&card, DType::F32, 200)?,
    );
    assert!(cpu[199] < 0.7 * cpu[0], "{} to {}", cpu[0], cpu[199]);
    for (step, (cpu, card)) in cpu.iter().zip(&card).enumerate() {
        assert!(
            (cpu - card).abs() <= 2e-3 * cpu,
            "step {step}: {cpu} and {card}"
        );
    }
    Ok(())
}

#[test]
fn bf16_training_follows_f32() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    let f32 = train(&card, DType::F32, 60)?;
    let bf16 = train(&card, DType::BF16, 60)?;
    for (step, (f32, bf16)) in f32.iter().zip(&bf16).enumerate() {
        assert!(
            (f32 - bf16).abs() <= 0.05 * f32,
            "step {step}: {f32} and {bf16}"
        );
    }
    Ok(())
}
