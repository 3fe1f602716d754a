//! A layer as one of several on the same input.

use candle_core::{Result, Tensor};

use super::{LinearLoRA, acting::Acting};
use crate::{DropoutPosition, LoraAdapter, op::shared::Member};

impl LinearLoRA {
    /// The layer as one of several on the input `xs`, if it can be.
    pub(crate) fn sharing(&self, xs: &Tensor) -> Result<Option<Sharing<'_>>> {
        let choice = self.choice()?;
        self.check_rows(xs, &choice)?;
        Ok(match self.acting(&choice) {
            Acting::One(lora, weight) if lora.is_fused() && !lora.drops_input() => Some(Sharing {
                layer: self,
                lora,
                weight,
            }),
            _ => None,
        })
    }
}

/// A layer that can run together with others on one input.
#[derive(Clone, Copy)]
pub(crate) struct Sharing<'a> {
    layer: &'a LinearLoRA,
    lora: &'a LoraAdapter,
    weight: f64,
}

impl<'a> Sharing<'a> {
    pub fn check_input(&self, xs: &Tensor) -> Result<()> {
        self.layer.check_input(xs)
    }

    /// With the next dropout mask.
    pub fn member(&self) -> Member<'a> {
        Member {
            base: &self.layer.base,
            a: self.lora.lora_a().as_tensor(),
            b: self.lora.lora_b().as_tensor(),
            scaling: self.lora.scaling() * self.weight,
            dropout: self.lora.mask().map(|(mask, _)| mask),
        }
    }
}

impl LoraAdapter {
    /// Whether the next forward pass drops elements of the input.
    fn drops_input(&self) -> bool {
        let mask = self.next_mask();
        mask.is_some_and(|(_, position)| position == DropoutPosition::Pre)
    }
}
