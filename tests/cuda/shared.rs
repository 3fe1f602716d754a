//! Layers that run together on one input.

use candle_core::{DType, Device, Module, Tensor, Var};
use lora_core::{
    PeftConfig,
    nn::{Linear, forward_shared},
    patch_linear_module,
};
use lora_tests::{randn, relative_error};

use crate::card;

const INPUTS: usize = 264;
/// Output width and rank of each layer.
const LAYERS: [(usize, usize); 3] = [(136, 16), (40, 4), (72, 24)];

fn layers(device: &Device, dtype: DType, dropout: f64) -> lora_core::Result<[Linear; 3]> {
    let mut layers = Vec::new();
    for (i, (outputs, rank)) in LAYERS.into_iter().enumerate() {
        let place = |tensor: Tensor, dtype| tensor.to_dtype(dtype)?.to_device(device);
        let weight = (randn(i as u32, (outputs, INPUTS), DType::F32) * 0.06)?;
        let bias = place(randn(10 + i as u32, outputs, DType::F32), dtype)?;
        let mut layer = Linear::new(place(weight, dtype)?, (i != 1).then_some(bias));
        let config = PeftConfig::all_linear()
            .dim(rank)
            .alpha(1.7 * rank as f64)
            .dropout(dropout);
        patch_linear_module(&format!("layers.{i}"), &mut layer, &config.adapter()?)?;
        let lora = layer.lora().expect("an adapter");
        let b = randn(20 + i as u32, (outputs, rank), DType::F32);
        lora.lora_b().set(&place(b, lora.lora_b().dtype())?)?;
        layers.push(layer);
    }
    Ok(layers.try_into().expect("three layers"))
}

/// Outputs, the gradient of `xs`, and those of every A and B, on the CPU.
fn run(layers: &[Linear; 3], xs: &Tensor, together: bool) -> lora_core::Result<Vec<Tensor>> {
    let xs = Var::from_tensor(xs)?;
    for lora in layers.iter().filter_map(Linear::lora) {
        lora.set_dropout_step(6);
    }
    let outputs = match together {
        true => forward_shared([&layers[0], &layers[1], &layers[2]], xs.as_tensor())?.to_vec(),
        false => layers
            .iter()
            .map(|layer| layer.forward(xs.as_tensor()))
            .collect::<candle_core::Result<_>>()?,
    };
    let mut loss = Tensor::zeros((), xs.dtype(), xs.device())?;
    for (i, ys) in outputs.iter().enumerate() {
        let g = randn(30 + i as u32, ys.shape(), DType::F32).to_dtype(ys.dtype())?;
        loss = (loss + ys.mul(&g.to_device(ys.device())?)?.sum_all()?)?;
    }
    let grads = loss.backward()?;
    let mut tensors = outputs;
    let grad = |var: &Var| grads.get(var).cloned().expect("a gradient");
    tensors.push(grad(&xs));
    for lora in layers.iter().filter_map(Linear::lora) {
        tensors.extend([grad(lora.lora_a()), grad(lora.lora_b())]);
    }
    let cpu = tensors.iter().map(|tensor| tensor.to_device(&Device::Cpu));
    Ok(cpu.collect::<candle_core::Result<_>>()?)
}

#[test]
fn they_compute_what_they_compute_alone_and_on_the_cpu() -> lora_core::Result<()> {
    let Some(card) = card() else { return Ok(()) };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
        for dropout in [0.0, 0.3] {
            for shape in [vec![130], vec![2, 65], vec![1], vec![0]] {
                let xs = randn(40, [shape, vec![INPUTS]].concat(), DType::F32).to_dtype(dtype)?;
                let on_card = layers(&card, dtype, dropout)?;
                let together = run(&on_card, &xs.to_device(&card)?, true)?;
                let alone = run(&on_card, &xs.to_device(&card)?, false)?;
                let cpu = layers(&Device::Cpu, DType::F64, dropout)?;
                let cpu = run(&cpu, &xs.to_dtype(DType::F64)?, false)?;
                for (i, (got, (alone, cpu))) in
                    together.iter().zip(alone.iter().zip(&cpu)).enumerate()
                {
                    // The CPU's weights are not rounded to the base's type.
                    let errors = (relative_error(got, alone), relative_error(got, cpu));
                    assert!(
                        errors.0 <= tolerance && errors.1 <= 2.0 * tolerance,
                        "tensor {i}, {dtype:?}, dropout {dropout}, {:?}: {errors:?}",
                        xs.shape()
                    );
                }
            }
        }
    }
    Ok(())
}
