//! What one adapter looks like.

use candle_core::{DType, Tensor};

use super::{DTYPES, config, is_adapter_dtype};
use crate::{DropoutPosition, Error, LoraInit, Result, op::compute_dtype};

/// What one adapter looks like: the part of [`PeftConfig`](crate::PeftConfig) that concerns a
/// single layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    pub(crate) dim: usize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_position: DropoutPosition,
    pub(crate) lora_a_init: LoraInit,
    pub(crate) lora_dtype: Option<DType>,
    pub(crate) use_fused: bool,
    pub(crate) seed: u64,
    pub(crate) rslora: bool,
    pub(crate) lora_bias: bool,
}

/// The shape of an adapter on a given layer, its rank apart.
pub(crate) struct AdapterShape {
    pub inputs: usize,
    pub outputs: usize,
    /// How many numbers the adapter has.
    pub parameters: usize,
    /// The type of the adapter's numbers.
    pub dtype: DType,
}

impl AdapterConfig {
    /// What the adapter's output is multiplied by: `alpha / dim`, or with rsLoRA `alpha / √dim`.
    pub fn scaling(&self) -> f64 {
        scaling(self.alpha, self.dim, self.rslora)
    }

    /// The numbers of an adapter on a layer of these widths; `None` if no memory holds them.
    fn parameters(&self, inputs: usize, outputs: usize) -> Option<usize> {
        let bias = if self.lora_bias { outputs } else { 0 };
        let parameters = self
            .dim
            .checked_mul(inputs.checked_add(outputs)?)?
            .checked_add(bias)?;
        // They are drawn in f64, and a vector has at most `isize::MAX` bytes.
        (parameters <= isize::MAX as usize / 8).then_some(parameters)
    }

    /// The shape of the adapter on the layer at `path` with this `weight`.
    ///
    /// # Errors
    /// If the layer can't have one.
    pub(crate) fn fit(&self, path: &str, weight: &Tensor) -> Result<AdapterShape> {
        let (outputs, inputs) = weight.dims2().map_err(|_| {
            let shape = weight.shape();
            let reason = format!("the weight has shape {shape:?}; it must be [out, in]");
            Error::module(path, reason)
        })?;
        if !is_adapter_dtype(weight.dtype()) {
            let reason = format!("a base of {} can't be adapted", weight.dtype().as_str());
            return Err(Error::module(path, reason));
        }
        let parameters = self.parameters(inputs, outputs).ok_or_else(|| {
            let reason = format!("no memory holds an adapter of rank {}", self.dim);
            Error::module(path, reason)
        })?;
        Ok(AdapterShape {
            inputs,
            outputs,
            parameters,
            dtype: self.lora_dtype.unwrap_or(compute_dtype(weight.dtype())),
        })
    }

    pub(crate) fn checked(self) -> Result<Self> {
        check_rank(self.dim, self.lora_a_init).map_err(|reason| config("dim", reason))?;
        check_alpha(self.alpha).map_err(|reason| config("alpha", reason))?;
        if !(0.0..1.0).contains(&self.dropout) {
            let reason = format!("{} is no probability below 1", self.dropout);
            return Err(config("dropout", reason));
        }
        if let Some(dtype) = self.lora_dtype
            && !is_adapter_dtype(dtype)
        {
            let reason = format!("{} can't be trained; use {DTYPES}", dtype.as_str());
            return Err(config("lora_dtype", reason));
        }
        if self.lora_bias && matches!(self.lora_a_init, LoraInit::Gaussian | LoraInit::Orthogonal) {
            let reason = format!(
                "an adapter with a bias can't begin as by `{}`; set lora_A_init to kaiming \
                 (PEFT's true), false or xavier",
                self.lora_a_init
            );
            return Err(config("lora_bias", reason));
        }
        Ok(self)
    }
}

/// `alpha / rank`, or with rsLoRA `alpha / √rank` (Kalajdzievski 2023).
pub(crate) fn scaling(alpha: f64, rank: usize, rslora: bool) -> f64 {
    let rank = rank as f64;
    alpha / if rslora { rank.sqrt() } else { rank }
}

/// Says what is wrong with a rank.
pub(crate) fn check_rank(rank: usize, init: LoraInit) -> Result<(), String> {
    if rank == 0 {
        return Err("the rank is 0; it must be at least 1".to_string());
    }
    if init == LoraInit::Orthogonal && rank % 2 == 1 {
        let reason = "lora_A_init `orthogonal` halves it, so that it must be even";
        return Err(format!("the rank is {rank}; {reason}"));
    }
    Ok(())
}

/// Says what is wrong with an alpha.
pub(crate) fn check_alpha(alpha: f64) -> Result<(), String> {
    if alpha.is_finite() && alpha > 0.0 {
        return Ok(());
    }
    let reason = format!("{alpha} is no positive number; the adapter could not act");
    Err(reason)
}
