//! An adapter out of a model.

use candle_core::{Device, Tensor};

use super::roster::switch;
use crate::{
    LoraTargets, Result,
    adapter::{AdapterWeights, Fingerprint},
};

/// The body of [`LoraTargets::export_adapter`].
pub(crate) fn export<M: LoraTargets + ?Sized>(model: &mut M, name: &str) -> Result<AdapterWeights> {
    let switch = switch(model)?;
    let id = switch.read().pick(name)?.id;
    let about = switch.read().about(id);
    let mut weights = AdapterWeights {
        bias: about.bias,
        modules_to_save: about.modules_to_save,
        origin: about.origin,
        ..AdapterWeights::default()
    };
    let (mut bases, mut others) = (Vec::new(), Vec::new());
    model.for_each_linear(&mut |path, linear| {
        let lora = linear.adapted();
        if let Some(trained) = lora.and_then(|lora| lora.trained(id)) {
            for (name, var) in trained.vars() {
                weights.saved.insert(format!("{path}.{name}"), copy(var)?);
            }
        }
        let adapter = lora.and_then(|lora| Some((lora, lora.lora(id)?)));
        match adapter.filter(|(_, adapter)| !adapter.is_idle()) {
            Some((lora, adapter)) => {
                bases.push((path.to_string(), lora.weight().clone()));
                weights.dropout = adapter.dropout();
                weights.dropout_position = adapter.dropout_position();
                weights.layers.insert(path.to_string(), adapter.weights()?);
            }
            None => others.push(path.to_string()),
        }
        Ok(())
    })?;
    if let Some(saved) = &switch.read().saved
        && saved.owner == id
    {
        for (key, parameter) in &saved.parameters {
            weights.saved.insert(key.clone(), copy(&parameter.trained)?);
        }
    }
    others.retain(|other| weights.layers.keys().any(|path| ends_with(other, path)));
    weights.excluded = others;
    let bases = bases.iter().map(|(path, weight)| (path.as_str(), weight));
    weights.origin.fingerprint = Some(Fingerprint::of(bases)?);
    Ok(weights)
}

/// A copy on the CPU, which does not follow later changes.
fn copy(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.detach().force_contiguous()?.to_device(&Device::Cpu)
}

/// Whether `end` is `path`, or its end from a dot.
fn ends_with(path: &str, end: &str) -> bool {
    path.strip_suffix(end)
        .is_some_and(|parent| parent.is_empty() || parent.ends_with('.'))
}
