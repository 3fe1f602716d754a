//! Adapters in the weights.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::Tensor;

use super::roster::{set_disabled, switch};
use crate::{
    Error, LoraTargets, ModulePath, Result, Visitor,
    join::switch_of,
    nn::Linear,
    saved::settle,
    selection::{Choice, Pick},
};

/// The body of [`LoraTargets::merge`].
pub(crate) fn merge_active<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    let choice = switch.read().current.clone();
    merge_choice(model, &choice)
}

/// The body of [`LoraTargets::merge_adapters`].
pub(crate) fn merge<M: LoraTargets + ?Sized>(
    model: &mut M,
    names: &[impl AsRef<str>],
) -> Result<()> {
    let switch = switch(model)?;
    let names = names.iter().map(|name| (name.as_ref(), 1.0));
    let choice = switch.read().sum(names)?;
    merge_choice(model, &choice)
}

/// Merges every layer that has any adapter, so that none goes on with what is selected.
fn merge_choice<M: LoraTargets + ?Sized>(model: &mut M, choice: &Choice) -> Result<()> {
    let Choice::Sum(picks) = choice else {
        return Err(Error::MixedBatch);
    };
    let parts = |picks: &[Pick]| -> Vec<_> {
        let parts = picks.iter().map(|pick| (pick.id, pick.weight.to_bits()));
        parts.collect()
    };
    let mut merged = HashMap::new();
    model.for_each_linear(&mut |path, linear| {
        match (linear.merged_picks(), linear.adapted()) {
            (Some(others), _) if parts(others) != parts(picks) => return Err(Error::Merged),
            (None, Some(lora)) => drop(merged.insert(path.to_string(), lora.merged(picks)?)),
            _ => {}
        }
        Ok(())
    })?;
    if merged.is_empty() {
        return Ok(());
    }
    let switch = switch(model)?;
    model.for_each_linear(&mut |path, linear| {
        if let Some(merged) = merged.remove(path.as_str()) {
            linear.set_merged(merged, picks);
        }
        Ok(())
    })?;
    settle(model, &switch)
}

/// The body of [`LoraTargets::merged_tensors`].
pub(crate) fn merged_tensors<M: LoraTargets + ?Sized>(
    model: &mut M,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let Some(switch) = switch_of(model)? else {
        return Ok(tensors);
    };
    let choice = switch.read().current.clone();
    let Choice::Sum(picks) = &choice else {
        return Err(Error::MixedBatch);
    };
    model.for_each_linear(&mut |path, linear| {
        let Some(lora) = linear.adapted() else {
            return Ok(());
        };
        let merged = lora.merged(picks)?;
        if merged.weight().id() != lora.weight().id() {
            tensors.insert(format!("{path}.weight"), merged.weight().clone());
        }
        let old = lora.bias().map(|bias| bias.id());
        if let Some(bias) = merged.bias().filter(|bias| Some(bias.id()) != old) {
            tensors.insert(format!("{path}.bias"), bias.clone());
        }
        Ok(())
    })?;
    if let Some(saved) = &switch.read().saved
        && choice.contains(saved.owner)
    {
        for (key, parameter) in &saved.parameters {
            let tensor = parameter.trained.as_tensor().detach();
            tensors.insert(key.clone(), tensor.force_contiguous()?);
        }
    }
    Ok(tensors)
}

/// The body of [`LoraTargets::merge_and_unload`].
pub(crate) fn merge_and_unload<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    merge_active(model)?;
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    set_disabled(model, false)?;
    let trained = switch.read().saved.as_ref().map(|saved| {
        let names = saved.parameters.keys().cloned();
        names.collect::<BTreeSet<String>>()
    });
    let mut unload = Unload {
        trained: trained.unwrap_or_default(),
    };
    model.patch_linear(&mut ModulePath::root(), &mut unload)?;
    switch.close();
    Ok(())
}

/// Makes what acts what the model is made of.
struct Unload {
    /// Parameters that share their memory with variables.
    trained: BTreeSet<String>,
}

impl Visitor for Unload {
    fn linear(&mut self, _: &ModulePath, linear: &mut Linear) -> Result<()> {
        linear.unload();
        Ok(())
    }

    fn parameter(&mut self, path: &ModulePath, name: &str, tensor: &mut Tensor) -> Result<()> {
        *tensor = match self.trained.contains(&format!("{path}.{name}")) {
            true => tensor.detach().force_contiguous()?,
            false => tensor.detach(),
        };
        Ok(())
    }
}

/// The body of [`LoraTargets::unmerge`].
pub(crate) fn unmerge<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    model.for_each_linear(&mut |_, linear| {
        linear.unmerge();
        Ok(())
    })?;
    match switch_of(model)? {
        Some(switch) => settle(model, &switch),
        None => Ok(()),
    }
}
