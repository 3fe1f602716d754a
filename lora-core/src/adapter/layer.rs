//! The matrices of one adapted layer: `ΔW = scaling · B A`.

use candle_core::Tensor;

use super::{product::Product, tensors};
use crate::Result;

/// The adapter of one linear layer: `ys = base(xs) + scaling · (xs Aᵀ Bᵀ + bias)`.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `A`, `[rank, in]`.
    pub a: Tensor,
    /// `B`, `[out, rank]`.
    pub b: Tensor,
    /// The bias of `B` (PEFT's `lora_bias`), `[out]`; scaled like `B`.
    pub bias: Option<Tensor>,
    /// With the rank it makes the scaling.
    pub alpha: f64,
    /// Whether the scaling is `alpha / √rank` (rsLoRA, Kalajdzievski 2023) instead of
    /// `alpha / rank`.
    pub rslora: bool,
}

impl LayerWeights {
    /// The rows of `A`.
    pub fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }

    /// The width of the layer's input.
    pub fn in_features(&self) -> usize {
        self.a.dims().get(1).copied().unwrap_or(0)
    }

    /// The width of the layer's output.
    pub fn out_features(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    /// What the product of the matrices is multiplied by.
    pub fn scaling(&self) -> f64 {
        let rank = self.rank() as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// What it adds to the layer's weight, `scaling · B A`, `[out, in]`, in f64 on the CPU.
    ///
    /// # Errors
    /// Those of candle, if the shapes don't fit.
    pub fn delta(&self) -> Result<Tensor> {
        Ok(Product::of(self)?.dense()?)
    }

    /// The Frobenius norm of [`delta`](Self::delta), which is not formed for it.
    ///
    /// # Errors
    /// As for [`delta`](Self::delta).
    pub fn norm(&self) -> Result<f64> {
        Ok(Product::of(self)?.norm()?)
    }

    /// The bytes of its tensors.
    pub fn bytes(&self) -> u64 {
        let tensors = [Some(&self.a), Some(&self.b), self.bias.as_ref()];
        tensors.into_iter().flatten().map(tensors::size).sum()
    }

    /// What is wrong with the shapes or numbers, if anything is.
    pub(super) fn problem(&self) -> Option<String> {
        let (a, b) = (self.a.dims(), self.b.dims());
        let bias = self.bias.as_ref().map(|bias| bias.dims());
        match (a, b) {
            ([rank, inputs], [outputs, columns])
                if rank == columns && rank * inputs * outputs > 0 => {}
            _ => {
                return Some(format!(
                    "has A of shape {a:?} and B of {b:?}; they must be [rank, in] and [out, rank]"
                ));
            }
        }
        if bias.is_some_and(|bias| bias != &b[..1]) {
            return Some(format!(
                "has a bias of shape {bias:?} with B of shape {b:?}"
            ));
        }
        (!self.alpha.is_finite()).then(|| format!("has alpha {}", self.alpha))
    }
}
