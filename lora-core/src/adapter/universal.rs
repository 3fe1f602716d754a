//! An adapter that every reader takes alike: one rank, one alpha, nothing but matrices.
//!
//! vLLM divides alpha by the configuration's rank and knows no patterns; llama.cpp's converter
//! divides by each tensor's rank and knows no rsLoRA. So all layers get the largest rank, by rows
//! and columns of zeros, and `B` takes what is left of the scaling.

use candle_core::{DType, Device, Tensor};

use super::{AdapterWeights, LayerWeights, config_file::commonest};
use crate::{BiasMode, Error, Result};

impl AdapterWeights {
    /// The same adapter in the form of [`Profile::Universal`](super::Profile::Universal).
    ///
    /// `B` is multiplied by a number that is 1 where it can be. Where that would round 16-bit
    /// tensors, they become f32; f64 becomes f32 always.
    ///
    /// # Errors
    /// An [`Error::Adapter`] that names what the form can't hold: `lora_bias`, and whole tensors
    /// that were trained with it.
    pub fn to_universal(&self) -> Result<Self> {
        let mut problems: Vec<String> = self
            .layers
            .iter()
            .filter(|(_, layer)| layer.bias.is_some())
            .map(|(path, _)| format!("`{path}` has a bias (lora_bias)"))
            .collect();
        if !self.modules_to_save.is_empty() {
            problems.push(format!("modules_to_save = {:?}", self.modules_to_save));
        }
        if self.bias != BiasMode::None {
            problems.push("the base's biases were trained".into());
        }
        problems.extend(
            self.saved
                .keys()
                .map(|name| format!("`{name}` is a whole tensor")),
        );
        if !problems.is_empty() {
            return Err(Error::Adapter(format!(
                "the universal form holds nothing but lora_A and lora_B; merge this adapter into \
                 its base, or write PEFT's form: {}",
                problems.join("; ")
            )));
        }

        let rank = self
            .layers
            .values()
            .map(LayerWeights::rank)
            .max()
            .unwrap_or(1);
        // Most layers keep their B if alpha is the commonest one. It must be a whole number, and
        // llama.cpp's converter takes 0 for 1.
        let whole = self
            .layers
            .values()
            .map(|layer| alpha_at(layer, rank))
            .filter(|alpha| *alpha >= 1.0 && alpha.fract() == 0.0 && *alpha < 1e9)
            .map(|alpha| alpha as u64);
        let alpha = commonest(whole).unwrap_or(rank as u64) as f64;
        let mut layers = self.layers.clone();
        for (path, layer) in &mut layers {
            *layer = uniform(layer, rank, alpha)
                .map_err(|error| Error::module(path, error.to_string()))?;
        }
        Ok(Self {
            layers,
            excluded: Vec::new(),
            ..self.clone()
        })
    }
}

/// The alpha with which the layer, padded to `rank`, acts as it does.
fn alpha_at(layer: &LayerWeights, rank: usize) -> f64 {
    match layer.rank() == rank && !layer.rslora {
        true => layer.alpha, // not by way of the scaling, which is rounded
        false => layer.scaling() * rank as f64,
    }
}

fn uniform(layer: &LayerWeights, rank: usize, alpha: f64) -> candle_core::Result<LayerWeights> {
    let factor = alpha_at(layer, rank) / alpha;
    let dtype = match (layer.a.dtype(), layer.b.dtype()) {
        (a, b) if a == b && a != DType::F64 && (a == DType::F32 || is_power_of_two(factor)) => a,
        _ => DType::F32,
    };
    let (a, b) = (
        layer.a.to_device(&Device::Cpu)?,
        layer.b.to_device(&Device::Cpu)?,
    );
    let b = match factor {
        1.0 => b.to_dtype(dtype)?,
        factor => (b.to_dtype(DType::F64)? * factor)?.to_dtype(dtype)?,
    };
    let missing = rank - layer.rank();
    let a = a.to_dtype(dtype)?.pad_with_zeros(0, 0, missing)?;
    Ok(LayerWeights {
        a: a.contiguous()?,
        b: b.pad_with_zeros(1, 0, missing)?.contiguous()?,
        bias: None,
        alpha,
        rslora: false,
    })
}

/// Whether multiplying by `factor` rounds nothing, under- and overflow apart.
fn is_power_of_two(factor: f64) -> bool {
    let mantissa = factor.to_bits() & ((1 << 52) - 1);
    factor.is_normal() && mantissa == 0
}

/// The exact product of the matrices' scale and `B`, in f64: what consumers must agree on.
pub(super) fn scaled_b(layer: &LayerWeights) -> candle_core::Result<Tensor> {
    layer.b.to_device(&Device::Cpu)?.to_dtype(DType::F64)? * layer.scaling()
}
