//! The matrices of one adapted layer: `ΔW = scaling · B A`.

use candle_core::Tensor;

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
}
