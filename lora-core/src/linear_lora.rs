//! A frozen linear layer with its adapter.

use std::sync::Arc;

use candle_core::{Module, Tensor, Var, bail};

use crate::{
    AdapterConfig, DropoutPosition, Error, Result,
    config::scaling,
    dropout::Dropout,
    op::{FrozenLinear, LoraLinear, compute_dtype},
};

/// A linear layer whose weight `W [out, in]` and bias are frozen, and an adapter that is trained:
/// `ys = xs Wᵀ + b + alpha / rank · D(xs) Aᵀ Bᵀ` (Hu et al. 2021).
///
/// `xs` has any rank from 1 up and any strides; its last dimension is `in`. The adapter's numbers
/// may be of another type than the base's: f32 over a bf16 base by default. Forward and backward
/// are one operation each, which computes no gradient for `W` and `b`.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lora_core::{LinearLoRA, PeftConfig};
///
/// let dev = Device::Cpu;
/// let weight = Tensor::randn(0f32, 1.0, (6, 4), &dev)?;
/// let config = PeftConfig::all_linear().dim(2).alpha(3.0).adapter()?;
/// let layer = LinearLoRA::new("q_proj", weight.clone(), None, &config)?;
///
/// let xs = Tensor::randn(0f32, 1.0, (5, 4), &dev)?;
/// let ys = layer.forward(&xs)?;
/// // B begins at zero, so nothing has changed yet.
/// assert_eq!(ys.to_vec2::<f32>()?, xs.matmul(&weight.t()?)?.to_vec2::<f32>()?);
///
/// let grads = ys.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(layer.lora_b()).unwrap().dims(), [6, 2]);
/// assert!(grads.get(&weight).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LinearLoRA {
    path: Arc<str>,
    base: FrozenLinear,
    lora_a: Var,
    lora_b: Var,
    alpha: f64,
    rslora: bool,
    dropout: Dropout,
    dropout_position: DropoutPosition,
    fused: bool,
    training: bool,
    enabled: bool,
}

impl LinearLoRA {
    /// A fresh adapter on the layer at `path`: `A` drawn as the configuration says, `B` zero. It
    /// begins in training mode. The path is the name in errors, and a seed of `A` and of dropout.
    ///
    /// # Errors
    /// If the weight is no matrix or of a type that can't be trained on.
    pub fn new(
        path: &str,
        weight: Tensor,
        bias: Option<Tensor>,
        config: &AdapterConfig,
    ) -> Result<Self> {
        let fresh = config.draw(path, &weight)?;
        if fresh.bias.is_some() {
            let reason = "an adapter has no bias of its own: leave it out".to_string();
            let field = "lora_bias";
            return Err(Error::Config { field, reason });
        }
        Self::from_tensors(path, weight, bias, (fresh.a, fresh.b), config)
    }

    /// An adapter of given tensors, `A [rank, in]` and `B [out, rank]`.
    pub(crate) fn from_tensors(
        path: &str,
        weight: Tensor,
        bias: Option<Tensor>,
        (lora_a, lora_b): (Tensor, Tensor),
        config: &AdapterConfig,
    ) -> Result<Self> {
        Ok(Self {
            path: path.into(),
            base: FrozenLinear::new(weight, bias),
            lora_a: Var::from_tensor(&lora_a)?,
            lora_b: Var::from_tensor(&lora_b)?,
            alpha: config.alpha,
            rslora: config.rslora,
            dropout: Dropout::new(config.dropout, config.seed, path),
            dropout_position: config.dropout_position,
            fused: config.use_fused,
            training: true,
            enabled: true,
        })
    }

    /// The path that the layer was adapted under.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `A`, `[rank, in]`.
    pub fn lora_a(&self) -> &Var {
        &self.lora_a
    }

    /// `B`, `[out, rank]`.
    pub fn lora_b(&self) -> &Var {
        &self.lora_b
    }

    /// The frozen weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        self.base.weight()
    }

    /// The frozen bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.base.bias()
    }

    /// The rank r.
    pub fn rank(&self) -> usize {
        self.lora_a.dims()[0]
    }

    /// Alpha.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Whether the scaling is rsLoRA's.
    pub fn is_rslora(&self) -> bool {
        self.rslora
    }

    /// What the adapter's output is multiplied by: `alpha / rank`, or with rsLoRA `alpha / √rank`.
    pub fn scaling(&self) -> f64 {
        scaling(self.alpha, self.rank(), self.rslora)
    }

    /// The probability of dropout.
    pub fn dropout(&self) -> f64 {
        self.dropout.probability()
    }

    /// Whether dropout is on.
    pub fn is_training(&self) -> bool {
        self.training
    }

    /// Turns dropout on or off.
    pub fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    /// Whether the adapter takes part in the forward pass.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Lets the adapter take part in the forward pass, or not.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Makes `step` the number of the next dropout mask, to repeat or resume a run.
    pub fn set_dropout_step(&self, step: u64) {
        self.dropout.set_step(step);
    }

    /// What the adapter adds to the weight: `alpha / rank · B A`, `[out, in]`, in f32 (f64 over an
    /// f64 base).
    ///
    /// # Errors
    /// Those of the product.
    pub fn delta_weight(&self) -> Result<Tensor> {
        let dtype = compute_dtype(self.weight().dtype());
        let a = self.lora_a.as_tensor().detach().to_dtype(dtype)?;
        let b = self.lora_b.as_tensor().detach().to_dtype(dtype)?;
        Ok((b.matmul(&a)? * self.scaling())?)
    }

    /// The weight with the adapter in it: `W + alpha / rank · B A`, a new tensor of the weight's
    /// type, rounded once.
    ///
    /// # Errors
    /// Those of the product.
    pub fn merged_weight(&self) -> Result<Tensor> {
        let delta = self.delta_weight()?;
        let weight = self.weight();
        Ok((weight.to_dtype(delta.dtype())? + delta)?.to_dtype(weight.dtype())?)
    }

    /// The layer of `xs`, `[tokens, in]` and contiguous.
    fn forward_rows(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        if !self.enabled {
            return self.base.apply(xs);
        }
        let mask = if self.training {
            self.dropout.next()
        } else {
            None
        };
        let dropout = mask.map(|mask| (mask, self.dropout_position));
        let adapter = (self.lora_a.as_tensor(), self.lora_b.as_tensor());
        if self.fused {
            return LoraLinear::apply(self.base.clone(), xs, adapter, self.scaling(), dropout);
        }

        let dtype = compute_dtype(xs.dtype());
        let masked = |xs: Tensor, position| match dropout {
            Some((mask, at)) if at == position => {
                xs.mul(&mask.tensor(xs.shape(), dtype, xs.device())?)
            }
            _ => Ok(xs),
        };
        let (a, b) = (adapter.0.to_dtype(dtype)?, adapter.1.to_dtype(dtype)?);
        let input = masked(xs.to_dtype(dtype)?, DropoutPosition::Pre)?;
        let delta = input.matmul(&a.t()?)?.matmul(&b.t()?)?;
        let delta = masked((delta * self.scaling())?, DropoutPosition::Post)?;
        (self.base.apply(xs)?.to_dtype(dtype)? + delta)?.to_dtype(xs.dtype())
    }
}

impl Module for LinearLoRA {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let (outputs, inputs) = self.weight().dims2()?;
        if xs.dims().last() != Some(&inputs) || xs.dtype() != self.weight().dtype() {
            bail!(
                "{}: the input is {:?} of {}; it must be [.., {inputs}] of {}",
                self.path,
                xs.dims(),
                xs.dtype().as_str(),
                self.weight().dtype().as_str(),
            );
        }
        over_rows(xs, outputs, |xs| self.forward_rows(xs))
    }
}

/// Applies `layer` to `xs [.., in]` seen as contiguous rows `[tokens, in]`.
pub(crate) fn over_rows(
    xs: &Tensor,
    outputs: usize,
    layer: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let Some((&inputs, leading)) = xs.dims().split_last() else {
        bail!("a linear layer expects an input of at least one dimension")
    };
    let tokens = leading.iter().product::<usize>();
    let shape = [leading, &[outputs]].concat();
    layer(&xs.reshape((tokens, inputs))?.contiguous()?)?.reshape(shape)
}
