//! What adapters make of the tensors of a model.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Shape, Tensor, bail};

use crate::{
    Error, Result,
    adapter::{AdapterWeights, LayerWeights},
    config::is_adapter_dtype,
    op::compute_dtype,
};

/// What becomes of one tensor of the model.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    /// A whole tensor in its place.
    pub replacement: Option<Tensor>,
    deltas: Vec<Delta>,
}

#[derive(Clone, Debug)]
enum Delta {
    /// `scaling · B A`
    Weight { a: Tensor, b: Tensor, scaling: f64 },
    /// `scaling · c`
    Bias { bias: Tensor, scaling: f64 },
}

/// The changes that `adapters`, each with its weight, make to a model, by its tensors' names.
pub(super) fn collect(
    adapters: impl IntoIterator<Item = (AdapterWeights, f64)>,
) -> Result<BTreeMap<String, Change>> {
    let mut changes = BTreeMap::<String, Change>::new();
    for (adapter, weight) in adapters {
        for (path, layer) in adapter.layers {
            check(&path, &layer)?;
            let scaling = weight * layer.scaling();
            if !scaling.is_finite() {
                let reason = format!("the adapter's scaling is {scaling}; it must be finite");
                return Err(Error::module(path, reason));
            }
            if let Some(bias) = layer.bias {
                let change = changes.entry(format!("{path}.bias")).or_default();
                change.deltas.push(Delta::Bias { bias, scaling });
            }
            let change = changes.entry(format!("{path}.weight")).or_default();
            let (a, b) = (layer.a, layer.b);
            change.deltas.push(Delta::Weight { a, b, scaling });
        }
        for (name, tensor) in adapter.saved {
            let replacement = &mut changes.entry(name.clone()).or_default().replacement;
            let problem = if replacement.is_some() {
                "another adapter has one too; merge one of them only"
            } else if weight != 1.0 {
                "it can't be weighted; merge this adapter with weight 1"
            } else {
                *replacement = Some(tensor);
                continue;
            };
            let reason = format!("the adapter has a whole tensor in its place, and {problem}");
            return Err(Error::module(name, reason));
        }
    }
    Ok(changes)
}

impl Change {
    /// The changed tensor in `dtype`, of the base's, which `base` finds in the type asked for.
    pub fn apply(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
        base: impl FnOnce(DType) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        if !is_adapter_dtype(dtype) {
            bail!(
                "`{name}` is of {}: an adapter can be merged into weights of f32, f64, bf16 or f16 \
                 alone, not into quantised ones",
                dtype.as_str()
            )
        }
        let wide = compute_dtype(dtype);
        let here = |tensor: &Tensor| tensor.to_device(device)?.to_dtype(wide);
        let mut sum = match &self.replacement {
            Some(tensor) => here(tensor)?,
            None => here(&base(wide)?)?,
        };
        for delta in &self.deltas {
            let delta = match delta {
                Delta::Weight { a, b, scaling } => (here(b)?.matmul(&here(a)?)? * *scaling)?,
                Delta::Bias { bias, scaling } => (here(bias)? * *scaling)?,
            };
            fits(name, sum.shape(), delta.shape())?;
            sum = (sum + delta)?;
        }
        let sum = sum.to_dtype(dtype)?;
        // Zero times anything finite is zero; times infinity or NaN it is NaN.
        let zero = (&sum * 0.0)?.to_dtype(DType::F32)?.sum_all()?;
        if zero.to_scalar::<f32>()? != 0.0 {
            bail!("`{name}` has values that are not finite once the adapter is in it")
        }
        Ok(sum)
    }
}

/// Checks that the matrices of a layer fit each other.
fn check(path: &str, layer: &LayerWeights) -> Result<()> {
    let (a, b) = (layer.a.dims(), layer.b.dims());
    let bias = layer.bias.as_ref().map(Tensor::dims);
    match (a, b) {
        ([rank, _], [outputs, columns])
            if rank == columns && bias.is_none_or(|bias| bias == [*outputs]) =>
        {
            Ok(())
        }
        _ => {
            let reason = format!("A {a:?}, B {b:?} and bias {bias:?} of the adapter don't fit");
            Err(Error::module(path, reason))
        }
    }
}

/// Checks the shape of `name` in the adapter.
pub(super) fn fits(name: &str, model: &Shape, adapter: &Shape) -> candle_core::Result<()> {
    if model != adapter {
        bail!("`{name}` is {model:?} in the model and {adapter:?} in the adapter")
    }
    Ok(())
}
