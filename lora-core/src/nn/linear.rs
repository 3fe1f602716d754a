//! A linear layer that can carry an adapter.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

/// `ys = xs Wᵀ + b`, in place of `candle_nn::Linear`.
#[derive(Clone, Debug)]
pub struct Linear {
    base: candle_nn::Linear,
    path: Option<Arc<str>>,
}

impl Linear {
    /// A layer of a weight `[out, in]` and an optional bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            base: candle_nn::Linear::new(weight, bias),
            path: None,
        }
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.base.forward(xs)
    }
}

/// Builds a layer with bias from `vb`'s `weight` and `bias`.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let path = Some(vb.prefix().into());
    Ok(Linear {
        base: candle_nn::linear(in_dim, out_dim, vb)?,
        path,
    })
}

/// Builds a layer without bias from `vb`'s `weight`.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let path = Some(vb.prefix().into());
    Ok(Linear {
        base: candle_nn::linear_no_bias(in_dim, out_dim, vb)?,
        path,
    })
}

/// Builds a layer with or without bias.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    if bias {
        linear(in_dim, out_dim, vb)
    } else {
        linear_no_bias(in_dim, out_dim, vb)
    }
}
