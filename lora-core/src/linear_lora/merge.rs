//! The weights of a layer with adapters in them.

use candle_core::{DType, Tensor, Var};

use super::LinearLoRA;
use crate::{
    Error, LoraAdapter, Result,
    op::compute_dtype,
    selection::{Choice, Pick},
};

impl LinearLoRA {
    /// What the active adapters add to the weight: the sum of `scaling · B A`, `[out, in]`, in f32
    /// (f64 over an f64 base).
    ///
    /// # Errors
    /// Those of the product; if a mixed batch is selected, which has no one weight.
    pub fn delta_weight(&self) -> Result<Tensor> {
        let dtype = compute_dtype(self.weight().dtype());
        match self.delta(&self.active()?, dtype)? {
            Some(delta) => Ok(delta),
            None => Ok(self.weight().zeros_like()?.to_dtype(dtype)?),
        }
    }

    /// The weight with the active adapters in it, a new tensor of the weight's type: `W` and the
    /// sum of `scaling · B A`, rounded once.
    ///
    /// # Errors
    /// Those of the product; if a number of the result is not finite; if a mixed batch is selected,
    /// which has no one weight.
    pub fn merged_weight(&self) -> Result<Tensor> {
        Ok(self.merged(&self.active()?)?.weight().clone())
    }

    /// The adapters that are active wherever no scope says otherwise.
    pub(crate) fn active(&self) -> Result<Vec<Pick>> {
        match &self.switch().read().current {
            Choice::Sum(picks) => Ok(picks.to_vec()),
            Choice::Rows(_) => Err(Error::MixedBatch),
        }
    }

    /// The layer with these adapters in its weight and bias.
    ///
    /// # Errors
    /// Those of the product; if a number of the result is not finite.
    pub(crate) fn merged(&self, picks: &[Pick]) -> Result<candle_nn::Linear> {
        let dtype = compute_dtype(self.weight().dtype());
        let trained = picks.iter().find_map(|pick| self.trained(pick.id));
        let own = |var: &Var| var.as_tensor().detach();
        let weight = trained.and_then(|trained| trained.weight.as_ref()).map(own);
        let bias = trained.and_then(|trained| trained.bias.as_ref()).map(own);
        let weight = self.changed(
            "weight",
            Some(self.weight()),
            weight,
            self.delta(picks, dtype)?,
        );
        let bias = self.changed("bias", self.bias(), bias, self.delta_bias(picks, dtype)?);
        let (weight, bias) = (weight?, bias?);
        Ok(candle_nn::Linear::new(
            weight.unwrap_or_else(|| self.weight().clone()),
            bias,
        ))
    }

    /// A parameter with what was trained in its place, and what is added to that. One that does not
    /// change is not copied.
    fn changed(
        &self,
        name: &str,
        base: Option<&Tensor>,
        trained: Option<Tensor>,
        delta: Option<Tensor>,
    ) -> Result<Option<Tensor>> {
        if trained.is_none() && delta.is_none() {
            return Ok(base.cloned());
        }
        let dtype = self.weight().dtype();
        let sum = match (trained.as_ref().or(base), delta) {
            (Some(base), Some(delta)) => (base.to_dtype(delta.dtype())? + delta)?,
            (None, Some(delta)) => delta,
            (Some(base), None) => base.force_contiguous()?,
            (None, None) => return Ok(None),
        };
        let changed = sum.to_dtype(dtype)?;
        if !is_finite(&changed)? {
            let reason = format!(
                "merging makes a number of its {name} NaN or infinite in {}; nothing was changed",
                dtype.as_str()
            );
            return Err(Error::module(self.path(), reason));
        }
        Ok(Some(changed))
    }

    fn delta(&self, picks: &[Pick], dtype: DType) -> Result<Option<Tensor>> {
        let delta =
            |(lora, weight): (&LoraAdapter, f64)| lora.delta_weight(weight, dtype).map(Some);
        sum(self.of(picks).map(delta))
    }

    fn delta_bias(&self, picks: &[Pick], dtype: DType) -> Result<Option<Tensor>> {
        let delta = |(lora, weight): (&LoraAdapter, f64)| lora.delta_bias(weight, dtype);
        sum(self.of(picks).map(delta))
    }
}

/// The sum of tensors, in their order.
fn sum(tensors: impl Iterator<Item = Result<Option<Tensor>>>) -> Result<Option<Tensor>> {
    let mut sum = None;
    for tensor in tensors {
        sum = match (sum, tensor?) {
            (Some(sum), Some(tensor)) => Some((sum + tensor)?),
            (sum, tensor) => sum.or(tensor),
        };
    }
    Ok(sum)
}

/// Whether no number is NaN or infinite: zero times any of those is NaN.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    let tensor = tensor.to_dtype(compute_dtype(tensor.dtype()))?;
    let sum = (tensor * 0.0)?.sum_all()?.to_dtype(DType::F64)?;
    Ok(sum.to_scalar::<f64>()? == 0.0)
}
