//! Other numbers in the place of an adapter's.

use candle_core::{Tensor, Var};

use super::{LoraAdapter, check};
use crate::{DropoutPosition, Result, adapter::LayerWeights};

/// Numbers that fit in the place of others.
pub(crate) struct Swap {
    a: Tensor,
    b: Tensor,
    bias: Option<Tensor>,
    rank: usize,
    alpha: f64,
    rslora: bool,
}

impl LoraAdapter {
    /// Gets `layer` ready to take the place of the numbers of the layer at `path`, whose weight is
    /// `weight`; `None` makes the adapter leave it alone. Or says what is wrong.
    pub(crate) fn prepare(
        &self,
        path: &str,
        weight: &Tensor,
        layer: Option<&LayerWeights>,
    ) -> Result<Swap, String> {
        if let Some(layer) = layer {
            check(path, weight, layer)?;
            let room = self.lora_a.dims()[0];
            if layer.rank() > room {
                return Err(format!(
                    "`{path}` has rank {}, for which there is no room in place: it has {room}",
                    layer.rank()
                ));
            }
            if layer.bias.is_some() && self.lora_bias.is_none() {
                return Err(format!(
                    "`{path}` has a lora_bias, for which there is no room in place"
                ));
            }
        }
        let padded = |var: &Var, tensor: Option<&Tensor>| -> candle_core::Result<Tensor> {
            let Some(tensor) = tensor else {
                return var.zeros_like();
            };
            let tensor = tensor
                .detach()
                .to_device(var.device())?
                .to_dtype(var.dtype())?;
            let mut padded = tensor.force_contiguous()?;
            for dim in 0..var.rank() {
                padded = padded.pad_with_zeros(dim, 0, var.dim(dim)? - padded.dim(dim)?)?;
            }
            padded.contiguous()
        };
        let prepare = || -> candle_core::Result<Swap> {
            let bias = layer.and_then(|layer| layer.bias.as_ref());
            Ok(Swap {
                a: padded(&self.lora_a, layer.map(|layer| &layer.a))?,
                b: padded(&self.lora_b, layer.map(|layer| &layer.b))?,
                bias: match &self.lora_bias {
                    Some(var) => Some(padded(var, bias)?),
                    None => None,
                },
                rank: layer.map_or(0, LayerWeights::rank),
                alpha: layer.map_or(self.alpha, |layer| layer.alpha),
                rslora: layer.map_or(self.rslora, |layer| layer.rslora),
            })
        };
        prepare().map_err(|error| format!("`{path}`: {error}"))
    }

    /// Copies `swap` over the numbers.
    pub(crate) fn swap(
        &mut self,
        swap: &Swap,
        (dropout, dropout_position): (f64, DropoutPosition),
    ) -> Result<()> {
        self.lora_a.set(&swap.a)?;
        self.lora_b.set(&swap.b)?;
        if let (Some(var), Some(bias)) = (&self.lora_bias, &swap.bias) {
            var.set(bias)?;
        }
        (self.rank, self.alpha, self.rslora) = (swap.rank, swap.alpha, swap.rslora);
        self.dropout = self.dropout.with_probability(dropout);
        self.dropout_position = dropout_position;
        Ok(())
    }
}
