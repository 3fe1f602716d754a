//! One adapter on one linear layer.

mod swap;

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Device, Tensor, Var};

use crate::{
    AdapterConfig, DropoutPosition, Mask, Result,
    adapter::LayerWeights,
    config::{is_adapter_dtype, scaling},
    dropout::Dropout,
    op::{compute_dtype, parts::Part},
    switch::AdapterId,
};

pub(crate) use swap::Swap;

/// One of the adapters of a [`LinearLoRA`](crate::LinearLoRA):
/// `scaling · (D(xs) Aᵀ Bᵀ + c)`, with a bias `c` if the configuration asked for one.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    id: AdapterId,
    lora_a: Var,
    lora_b: Var,
    lora_bias: Option<Var>,
    /// Rows of `A` in use: all of them, until an adapter of lower rank is swapped in. Zero: the
    /// adapter that was swapped in leaves this layer alone.
    rank: usize,
    alpha: f64,
    rslora: bool,
    dropout: Dropout,
    dropout_position: DropoutPosition,
    fused: bool,
    training: bool,
}

impl LoraAdapter {
    /// A fresh adapter for the layer at `path`, in training mode.
    pub(crate) fn fresh(
        id: AdapterId,
        path: &str,
        weight: &Tensor,
        config: &AdapterConfig,
    ) -> Result<Self> {
        let fresh = config.draw(path, weight)?;
        Ok(Self {
            id,
            lora_a: Var::from_tensor(&fresh.a)?,
            lora_b: Var::from_tensor(&fresh.b)?,
            lora_bias: fresh.bias.as_ref().map(Var::from_tensor).transpose()?,
            rank: config.dim,
            alpha: config.alpha,
            rslora: config.rslora,
            dropout: Dropout::new(config.dropout, config.seed, path),
            dropout_position: config.dropout_position,
            fused: config.use_fused,
            training: true,
        })
    }

    /// An adapter of given numbers for the layer at `path`, in evaluation mode; or what is wrong
    /// with them.
    pub(crate) fn of(
        id: AdapterId,
        path: &str,
        weight: &Tensor,
        layer: &LayerWeights,
        (dropout, dropout_position): (f64, DropoutPosition),
    ) -> Result<Self, String> {
        check(path, weight, layer)?;
        let var = |tensor: &Tensor| -> candle_core::Result<Var> {
            Var::from_tensor(&tensor.detach().to_device(weight.device())?)
        };
        let build = || -> candle_core::Result<Self> {
            Ok(Self {
                id,
                lora_a: var(&layer.a)?,
                lora_b: var(&layer.b)?,
                lora_bias: layer.bias.as_ref().map(var).transpose()?,
                rank: layer.rank(),
                alpha: layer.alpha,
                rslora: layer.rslora,
                dropout: Dropout::new(dropout, 0, path),
                dropout_position,
                fused: true,
                training: false,
            })
        };
        build().map_err(|error| format!("`{path}`: {error}"))
    }

    pub(crate) fn id(&self) -> AdapterId {
        self.id
    }

    pub(crate) fn set_id(&mut self, id: AdapterId) {
        self.id = id;
    }

    /// `A`, `[rank, in]`; with more rows if an adapter of lower rank was swapped in, which are
    /// zero.
    pub fn lora_a(&self) -> &Var {
        &self.lora_a
    }

    /// `B`, `[out, rank]`; with more columns if an adapter of lower rank was swapped in, which are
    /// zero.
    pub fn lora_b(&self) -> &Var {
        &self.lora_b
    }

    /// The adapter's bias, `[out]`; scaled like `B`.
    pub fn lora_bias(&self) -> Option<&Var> {
        self.lora_bias.as_ref()
    }

    /// The rank r; zero if the adapter that was swapped in leaves this layer alone.
    pub fn rank(&self) -> usize {
        self.rank
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
        if self.is_idle() {
            return 0.0;
        }
        scaling(self.alpha, self.rank, self.rslora)
    }

    /// The probability of dropout.
    pub fn dropout(&self) -> f64 {
        self.dropout.probability()
    }

    /// The side of the adapter that dropout applies to.
    pub fn dropout_position(&self) -> DropoutPosition {
        self.dropout_position
    }

    /// Whether dropout is on.
    pub fn is_training(&self) -> bool {
        self.training
    }

    pub(crate) fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    pub(crate) fn set_dropout_step(&self, step: u64) {
        self.dropout.set_step(step);
    }

    pub(crate) fn is_fused(&self) -> bool {
        self.fused
    }

    /// Whether it does anything here at all.
    pub(crate) fn is_idle(&self) -> bool {
        self.rank == 0
    }

    /// The tensors to train, with their names after the path of the layer; `infix` is empty or
    /// `.<adapter>`.
    pub(crate) fn vars(&self, infix: &str) -> Vec<(String, Var)> {
        let mut vars = vec![
            (format!("lora_A{infix}.weight"), self.lora_a.clone()),
            (format!("lora_B{infix}.weight"), self.lora_b.clone()),
        ];
        let bias = self.lora_bias.clone();
        vars.extend(bias.map(|bias| (format!("lora_B{infix}.bias"), bias)));
        vars
    }

    /// `weight · scaling · B A`, `[out, in]`, computed in `dtype`.
    pub(crate) fn delta_weight(&self, weight: f64, dtype: DType) -> Result<Tensor> {
        let a = self.lora_a.as_tensor().detach().to_dtype(dtype)?;
        let b = self.lora_b.as_tensor().detach().to_dtype(dtype)?;
        Ok((b.matmul(&a)? * (self.scaling() * weight))?)
    }

    /// `weight · scaling · c`, `[out]`, computed in `dtype`.
    pub(crate) fn delta_bias(&self, weight: f64, dtype: DType) -> Result<Option<Tensor>> {
        let Some(bias) = &self.lora_bias else {
            return Ok(None);
        };
        let bias = bias.as_tensor().detach().to_dtype(dtype)?;
        Ok(Some((bias * (self.scaling() * weight))?))
    }

    /// The mask of the next forward pass.
    pub(crate) fn mask(&self) -> Option<(Mask, DropoutPosition)> {
        let mask = if self.training {
            self.dropout.next()
        } else {
            None
        };
        mask.map(|mask| (mask, self.dropout_position))
    }

    /// What [`mask`](Self::mask) would give.
    pub(crate) fn next_mask(&self) -> Option<(Mask, DropoutPosition)> {
        let mask = if self.training {
            self.dropout.peek()
        } else {
            None
        };
        mask.map(|mask| (mask, self.dropout_position))
    }

    /// The adapter as a part of a sum, on all rows or some.
    pub(crate) fn part(&self, weight: f64, rows: Option<Arc<[Range<usize>]>>) -> Part<'_> {
        Part {
            a: self.lora_a.as_tensor(),
            b: self.lora_b.as_tensor(),
            bias: self.lora_bias.as_ref().map(Var::as_tensor),
            scaling: self.scaling() * weight,
            dropout: self.mask(),
            rows,
        }
    }

    /// What it adds to the output for `xs`, composed of candle's operations, in the compute type.
    pub(crate) fn composed(&self, xs: &Tensor, weight: f64) -> candle_core::Result<Tensor> {
        let dtype = compute_dtype(xs.dtype());
        let dropout = self.mask();
        let masked = |xs: Tensor, position| match dropout {
            Some((mask, at)) if at == position => {
                xs.mul(&mask.tensor(xs.shape(), dtype, xs.device())?)
            }
            _ => Ok(xs),
        };
        let a = self.lora_a.to_dtype(dtype)?;
        let b = self.lora_b.to_dtype(dtype)?;
        let input = masked(xs.to_dtype(dtype)?, DropoutPosition::Pre)?;
        let mut delta = input.matmul(&a.t()?)?.matmul(&b.t()?)?;
        if let Some(bias) = &self.lora_bias {
            delta = delta.broadcast_add(&bias.to_dtype(dtype)?)?;
        }
        masked((delta * (self.scaling() * weight))?, DropoutPosition::Post)
    }

    /// The numbers in use, on the CPU, as they are now.
    pub(crate) fn weights(&self) -> Result<LayerWeights> {
        let copy = |tensor: Tensor| tensor.force_contiguous()?.to_device(&Device::Cpu);
        let (a, b) = (self.lora_a.detach(), self.lora_b.detach());
        Ok(LayerWeights {
            a: copy(a.narrow(0, 0, self.rank)?)?,
            b: copy(b.narrow(1, 0, self.rank)?)?,
            bias: match &self.lora_bias {
                Some(bias) => Some(copy(bias.detach())?),
                None => None,
            },
            alpha: self.alpha,
            rslora: self.rslora,
        })
    }
}

/// Says what keeps `layer` from acting on the layer at `path`.
fn check(path: &str, weight: &Tensor, layer: &LayerWeights) -> Result<(), String> {
    let [outputs, inputs] = *weight.dims() else {
        return Err(format!(
            "`{path}` has a weight of shape {:?}; only one of [out, in] can be adapted",
            weight.dims()
        ));
    };
    if !is_adapter_dtype(weight.dtype()) {
        let dtype = weight.dtype().as_str();
        return Err(format!("`{path}`: a base of {dtype} can't be adapted"));
    }
    let rank = layer.rank();
    let wanted = [
        ("lora_A.weight", Some(&layer.a), vec![rank, inputs]),
        ("lora_B.weight", Some(&layer.b), vec![outputs, rank]),
        ("lora_B.bias", layer.bias.as_ref(), vec![outputs]),
    ];
    for (name, tensor, dims) in wanted {
        let Some(tensor) = tensor else { continue };
        if tensor.dims() != dims {
            return Err(format!(
                "`{path}.{name}` has shape {:?}; with rank {rank} it must be {dims:?}",
                tensor.dims()
            ));
        }
        if !is_adapter_dtype(tensor.dtype()) {
            let dtype = tensor.dtype().as_str();
            return Err(format!(
                "`{path}.{name}` is of {dtype}, which can't be trained"
            ));
        }
    }
    if rank == 0 {
        return Err(format!("`{path}.lora_A.weight` has no rows"));
    }
    if !layer.alpha.is_finite() {
        return Err(format!("`{path}` has alpha {}", layer.alpha));
    }
    Ok(())
}
