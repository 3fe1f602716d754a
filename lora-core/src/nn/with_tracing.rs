//! The names and signatures of `candle_transformers::models::with_tracing`, so that a copy of one of
//! its models needs no more than another import.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

pub use super::{Embedding, LayerNorm, Linear, layer_norm, linear, linear_b, linear_no_bias};

/// [`nn::RmsNorm`](super::RmsNorm), built by `new`.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::VarBuilder;
/// use lora_core::nn::with_tracing::RmsNorm;
///
/// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let norm = RmsNorm::new(4, 1e-6, vb.pp("norm"))?;
/// assert_eq!(norm.forward(&Tensor::ones((2, 4), DType::F32, &Device::Cpu)?)?.dims(), [2, 4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RmsNorm(super::RmsNorm);

impl RmsNorm {
    /// A norm over `size` numbers with `vb`'s `weight`.
    ///
    /// # Errors
    /// If `vb` has no such tensor.
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        super::rms_norm(size, eps, vb).map(Self)
    }

    /// The same as `forward`, which is differentiable here.
    ///
    /// # Errors
    /// As for `forward`.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }

    /// The parameters with their names in the layer.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        self.0.params_mut()
    }
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(xs)
    }
}
