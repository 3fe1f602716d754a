//! Other numbers in the place of an adapter's: no tensor is made or dropped.

use std::collections::{BTreeSet, HashMap};

use candle_core::{Tensor, Var};

use super::{import::other_base, roster::switch};
use crate::{
    Error, LoraTargets, Result, adapter::AdapterWeights, config::is_adapter_dtype,
    lora_adapter::Swap, survey::Survey, switch::AdapterId,
};

/// The body of [`LoraTargets::swap_adapter`].
pub(crate) fn swap<M: LoraTargets + ?Sized>(
    model: &mut M,
    name: &str,
    weights: &AdapterWeights,
) -> Result<()> {
    let switch = switch(model)?;
    switch.unmerged()?;
    let id = switch.read().pick(name)?.id;
    let mut plan = Plan::new(weights);
    plan.add_layers(model, id)?;
    if let Some(saved) = &switch.read().saved
        && saved.owner == id
    {
        for (key, parameter) in &saved.parameters {
            plan.add_var(key, &parameter.trained, &parameter.original);
        }
    }
    if plan.is_sound() {
        let survey = Survey::of(model)?;
        plan.problems.extend(other_base(&survey, weights)?);
    }
    let Plan { layers, vars, .. } = plan
        .checked()
        .map_err(|problems| Error::adapter(name, problems.join("; ")))?;

    // Everything fits; what follows copies.
    model.for_each_linear(&mut |path, linear| {
        if let Some(swap) = layers.get(path.as_str())
            && let Some(adapter) = linear.adapted_mut().and_then(|lora| lora.lora_mut(id))
        {
            adapter.swap(swap, (weights.dropout, weights.dropout_position))?;
        }
        Ok(())
    })?;
    for (var, tensor) in vars {
        var.set(&tensor)?;
    }
    switch.write().set_about(id, weights.into());
    Ok(())
}

/// What goes where, and what is wrong.
struct Plan<'a> {
    weights: &'a AdapterWeights,
    /// Layers and parameters for which no place was found yet.
    homeless: BTreeSet<&'a str>,
    /// By the paths of their layers.
    layers: HashMap<String, Swap>,
    vars: Vec<(Var, Tensor)>,
    problems: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(weights: &'a AdapterWeights) -> Self {
        let keys = weights.layers.keys().chain(weights.saved.keys());
        Self {
            weights,
            homeless: keys.map(String::as_str).collect(),
            layers: HashMap::new(),
            vars: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// A layer that the weights leave out is left alone from then on.
    fn add_layers<M: LoraTargets + ?Sized>(&mut self, model: &mut M, id: AdapterId) -> Result<()> {
        model.for_each_linear(&mut |path, linear| {
            let Some(lora) = linear.adapted() else {
                return Ok(());
            };
            if let Some(adapter) = lora.lora(id) {
                let layer = self.weights.layers.get(path.as_str());
                self.homeless.remove(path.as_str());
                match adapter.prepare(path.as_str(), lora.weight(), layer) {
                    Ok(swap) => drop(self.layers.insert(path.to_string(), swap)),
                    Err(problem) => self.problems.push(problem),
                }
            }
            for (name, var) in lora
                .trained(id)
                .into_iter()
                .flat_map(|trained| trained.vars())
            {
                let base = if name == "weight" {
                    Some(lora.weight())
                } else {
                    lora.bias()
                };
                let base = base.unwrap_or(var.as_tensor());
                self.add_var(&format!("{path}.{name}"), var, base);
            }
            Ok(())
        })
    }

    /// A parameter that the weights leave out goes back to the base's numbers.
    fn add_var(&mut self, key: &str, var: &Var, base: &Tensor) {
        self.homeless.remove(key);
        let tensor = self.weights.saved.get(key).unwrap_or(base);
        if tensor.dims() != var.dims() || !is_adapter_dtype(tensor.dtype()) {
            self.problems.push(format!(
                "`{key}` is {:?} of {}; in place it is {:?} of {}",
                tensor.dims(),
                tensor.dtype().as_str(),
                var.dims(),
                var.dtype().as_str(),
            ));
            return;
        }
        let fitted = tensor
            .detach()
            .to_device(var.device())
            .and_then(|tensor| tensor.to_dtype(var.dtype())?.force_contiguous());
        match fitted {
            Ok(tensor) => self.vars.push((var.clone(), tensor)),
            Err(error) => self.problems.push(format!("`{key}`: {error}")),
        }
    }

    fn is_sound(&self) -> bool {
        self.problems.is_empty() && self.homeless.is_empty()
    }

    fn checked(mut self) -> Result<Self, Vec<String>> {
        if !(0.0..1.0).contains(&self.weights.dropout) {
            let dropout = self.weights.dropout;
            self.problems
                .push(format!("the dropout {dropout} is no probability below 1"));
        }
        let homeless = self.homeless.iter();
        self.problems.extend(homeless.map(|key| {
            format!("`{key}` is not in the adapter in place; delete it and import this one instead")
        }));
        if self.problems.is_empty() {
            Ok(self)
        } else {
            self.problems.sort();
            Err(self.problems)
        }
    }
}
