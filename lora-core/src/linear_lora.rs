//! A frozen linear layer with its adapter.

use std::sync::Arc;

use candle_core::{Module, Tensor, Var, bail};

use crate::{
    AdapterConfig, DropoutPosition, Error, Result,
    config::is_adapter_dtype,
    dropout::Dropout,
    op::{ComputePath, FrozenLinear, LoraLinear, compute_dtype, shared::Member},
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
        let (outputs, inputs) = weight.dims2().map_err(|_| {
            Error::module(
                path,
                format!(
                    "the weight has shape {:?}; it must be [out, in]",
                    weight.shape()
                ),
            )
        })?;
        if !is_adapter_dtype(weight.dtype()) {
            let reason = format!("a base of {} can't be adapted", weight.dtype().as_str());
            return Err(Error::module(path, reason));
        }
        let (device, init) = (weight.device(), config.lora_a_init);
        let dtype = config.lora_dtype.unwrap_or(compute_dtype(weight.dtype()));
        let lora_a = init.draw((config.dim, inputs), config.seed, path, dtype, device)?;
        let lora_b = Tensor::zeros((outputs, config.dim), dtype, device)?;
        Self::from_tensors(path, weight, bias, (lora_a, lora_b), config)
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

    /// What the adapter's output is multiplied by: `alpha / rank`.
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank() as f64
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

    /// How the layer would compute its output for `xs`, and why not faster. The same is told with
    /// every forward pass on a CUDA device, by `tracing` at its debug level.
    ///
    /// # Errors
    /// If `xs` is no input of this layer.
    pub fn compute_path(&self, xs: &Tensor) -> candle_core::Result<ComputePath> {
        self.check_input(xs)?;
        if !self.fused {
            return Ok(ComputePath::Composed("use_fused is off"));
        }
        let mask = match self.training {
            true => self.dropout.peek(),
            false => None,
        };
        let dropout = mask.map(|mask| (mask, self.dropout_position));
        let adapter = (self.lora_a.as_tensor(), self.lora_b.as_tensor());
        LoraLinear::path(&self.base, xs, adapter, dropout)
    }

    /// Whether `xs` has the width and the type of the weight.
    pub(crate) fn check_input(&self, xs: &Tensor) -> candle_core::Result<()> {
        let inputs = self.weight().dim(1)?;
        if xs.dims().last() != Some(&inputs) || xs.dtype() != self.weight().dtype() {
            bail!(
                "{}: the input is {:?} of {}; it must be [.., {inputs}] of {}",
                self.path,
                xs.dims(),
                xs.dtype().as_str(),
                self.weight().dtype().as_str(),
            );
        }
        Ok(())
    }

    /// Whether the adapter can run together with others on one input.
    pub(crate) fn can_share(&self) -> bool {
        let drops = self.training && self.dropout.probability() > 0.0;
        let on_input = self.dropout_position == DropoutPosition::Pre;
        self.enabled && self.fused && !(drops && on_input)
    }

    /// The layer as one of several on one input, with the next dropout mask.
    pub(crate) fn member(&self) -> Member<'_> {
        Member {
            base: &self.base,
            a: self.lora_a.as_tensor(),
            b: self.lora_b.as_tensor(),
            scaling: self.scaling(),
            dropout: self.training.then(|| self.dropout.next()).flatten(),
        }
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
        self.check_input(xs)?;
        over_rows(xs, self.weight().dim(0)?, |xs| self.forward_rows(xs))
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
