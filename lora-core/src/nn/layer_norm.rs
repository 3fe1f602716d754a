//! Layer normalisation.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, LayerNormConfig, VarBuilder};

use super::norm::Norm;

/// Layer normalisation over the last dimension, in place of `candle_nn::LayerNorm`:
/// `y = w (x - mean(x)) / sqrt(var(x) + eps) + b`
/// ([Ba, Kiros and Hinton, 2016](https://arxiv.org/abs/1607.06450)).
///
/// candle's own forward cuts the gradient when there is a bias and the input is contiguous; this one
/// passes it on. Weight and bias get a gradient only where they are variables. Half types are
/// computed in f32. On the CPU it is one fused op; on other devices it runs as candle's
/// differentiable ops.
///
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use lora_core::nn::LayerNorm;
///
/// let dev = Device::Cpu;
/// let norm = LayerNorm::new(Tensor::new(&[1f32, 2.], &dev)?, Tensor::new(&[0f32, 1.], &dev)?, 0.0);
/// let xs = Var::new(&[[3f32, 5.]], &dev)?;
/// let ys = norm.forward(&xs)?;
/// assert_eq!(ys.to_vec2::<f32>()?, [[-1., 3.]]);
/// assert!(ys.backward()?.get(&xs).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,       // [n]
    bias: Option<Tensor>, // [n]
    remove_mean: bool,
    eps: f64,
    path: Option<Arc<str>>,
}

impl LayerNorm {
    /// A norm with this weight `[n]` and bias `[n]`; `eps` is added to the variance.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            bias: Some(bias),
            ..Self::new_no_bias(weight, eps)
        }
    }

    /// A norm with this weight `[n]` and without bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            bias: None,
            remove_mean: true,
            eps,
            path: None,
        }
    }

    /// A norm that does not remove the mean: what [`RmsNorm`](super::RmsNorm) computes.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self {
            remove_mean: false,
            ..Self::new_no_bias(weight, eps)
        }
    }

    /// The scale `[n]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The shift `[n]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance before the root.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Whether the mean is removed first.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }

    /// The prefix of the [`VarBuilder`] that this layer was built from.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The parameters with their names in the layer.
    pub(crate) fn params_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        let bias = self.bias.as_mut().map(|bias| ("bias", bias));
        [("weight", &mut self.weight)].into_iter().chain(bias)
    }
}

impl Module for LayerNorm {
    /// Normalises `xs` `[.., n]` of the weight's dtype.
    ///
    /// # Errors
    /// When the last dimension or the dtype is not the weight's.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let norm = Norm {
            name: "layer-norm",
            eps: self.eps,
            remove_mean: self.remove_mean,
        };
        norm.apply(xs, &self.weight, self.bias.as_ref())
    }
}

/// Builds a norm over `size` numbers from `vb`'s `weight` and, when `config.affine`, `bias` (or
/// `gamma` and `beta`, where only those are there).
///
/// # Errors
/// When `vb` has no such tensors of shape `[size]`.
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let config = config.into();
    let path = Some(vb.prefix().into());
    let weight = super::get_either(&vb, size, ["weight", "gamma"], Init::Const(1.))?;
    let bias = config
        .affine
        .then(|| super::get_either(&vb, size, ["bias", "beta"], Init::Const(0.)))
        .transpose()?;
    Ok(LayerNorm {
        weight,
        bias,
        remove_mean: config.remove_mean,
        eps: config.eps,
        path,
    })
}

/// Builds a norm without bias over `size` numbers from `vb`'s `weight` (or `gamma`).
///
/// # Errors
/// When `vb` has no such tensor of shape `[size]`.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    let config = LayerNormConfig {
        eps,
        remove_mean: true,
        affine: false,
    };
    layer_norm(size, config, vb)
}
