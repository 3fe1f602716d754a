//! Root-mean-square normalisation.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::norm::Norm;

/// Root-mean-square normalisation over the last dimension, in place of `candle_nn::RmsNorm`:
/// `y = w x / sqrt(mean(x²) + eps)` ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).
///
/// candle's own forward cuts the gradient of a contiguous input; this one passes it on. The weight
/// gets a gradient only where it is a variable. Half types are computed in f32. On the CPU it is one
/// fused op; on other devices it runs as candle's differentiable ops.
///
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use lora_core::nn::RmsNorm;
///
/// let norm = RmsNorm::new(Tensor::new(&[1f32, 2.], &Device::Cpu)?, 0.0);
/// let xs = Var::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let ys = norm.forward(&xs)?; // [3, 4] / sqrt((9 + 16) / 2) times [1, 2]
/// assert!((ys.sum_all()?.to_scalar::<f32>()? - 11.0 / 12.5f32.sqrt()).abs() < 1e-6);
/// assert!(ys.backward()?.get(&xs).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor, // [n]
    eps: f64,
    path: Option<Arc<str>>,
}

impl RmsNorm {
    /// A norm with this weight `[n]`; `eps` is added to the mean square.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            eps,
            path: None,
        }
    }

    /// The scale `[n]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// What is added to the mean square before the root.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The prefix of the [`VarBuilder`] that this layer was built from.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The same as [`forward`](Module::forward), which is differentiable here.
    ///
    /// # Errors
    /// As for `forward`.
    pub fn forward_diff(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }

    /// The parameters with their names in the layer.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        [("weight", &mut self.weight)].into_iter()
    }
}

impl Module for RmsNorm {
    /// Normalises `xs` `[.., n]` of the weight's dtype.
    ///
    /// # Errors
    /// When the last dimension or the dtype is not the weight's.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let norm = Norm {
            name: "rms-norm",
            eps: self.eps,
            remove_mean: false,
        };
        norm.apply(xs, &self.weight, None)
    }
}

/// Builds a norm over `size` numbers from `vb`'s `weight` (or `gamma`, where only that is there).
///
/// # Errors
/// When `vb` has no such tensor of shape `[size]`.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    let path = Some(vb.prefix().into());
    Ok(RmsNorm {
        weight: super::get_either(&vb, size, ["weight", "gamma"], Init::Const(1.))?,
        eps,
        path,
    })
}
