//! Attaching adapters.

use std::collections::HashMap;

use candle_core::{Tensor, TensorId};

use crate::{
    AdapterConfig, Error, LinearLoRA, LoraReport, LoraSite, LoraTargets, ModulePath, PeftConfig,
    Result, Visitor,
    nn::Linear,
    select::{Saved, SavedFor, select, select_saved},
    survey::{Parameter, Survey},
};

/// Adapts one layer: NeMo AutoModel's `patch_linear_module`. `path` names it in errors and seeds
/// its numbers.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora_core::{PeftConfig, nn::Linear, patch_linear_module};
///
/// let mut layer = Linear::new(Tensor::zeros((6, 4), DType::F32, &Device::Cpu)?, None);
/// patch_linear_module("proj", &mut layer, &PeftConfig::all_linear().dim(2).adapter()?)?;
/// assert_eq!(layer.lora().unwrap().lora_a().dims(), [2, 4]);
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// # Errors
/// If the layer is adapted already, or can't be.
pub fn patch_linear_module(path: &str, linear: &mut Linear, config: &AdapterConfig) -> Result<()> {
    if linear.lora().is_some() {
        return Err(already_adapted(path));
    }
    let (weight, bias) = (linear.weight().clone(), linear.bias().cloned());
    linear.adapt(LinearLoRA::new(path, weight, bias, config)?);
    Ok(())
}

/// The body of [`LoraTargets::apply_lora`].
pub(crate) fn apply<M: LoraTargets>(model: &mut M, config: &PeftConfig) -> Result<LoraReport> {
    config.validate()?;
    let survey = Survey::of(model)?;
    let chosen = select::<M>(config, &survey.sites)?;
    if let Some(saved) = select_saved::<M>(config, &chosen, &survey)?.first() {
        return Err(untrained(&survey, saved));
    }
    let mut adapters = Vec::new();
    for (site, adapter) in survey.sites.iter().zip(chosen) {
        if let Some(adapter) = adapter {
            let (weight, bias) = (site.weight.clone(), site.bias.clone());
            adapters.push(LinearLoRA::new(&site.path, weight, bias, &adapter)?);
        }
    }
    attach(model, &survey, adapters)
}

/// Freezes everything and attaches `adapters` by their paths. Either all of it happens or none.
pub(crate) fn attach<M: LoraTargets>(
    model: &mut M,
    survey: &Survey,
    adapters: Vec<LinearLoRA>,
) -> Result<LoraReport> {
    if let Some(site) = survey.sites.iter().find(|site| site.adapted) {
        return Err(already_adapted(&site.path));
    }
    let report = LoraReport {
        sites: adapters.iter().map(LoraSite::of).collect(),
        base_parameters: survey.parameters,
    };
    let by_path = adapters
        .into_iter()
        .map(|lora| (lora.path().to_string(), lora));
    let mut attach = Attach {
        adapters: by_path.collect(),
        frozen: HashMap::new(),
    };
    model.patch_linear(&mut ModulePath::root(), &mut attach)?;
    Ok(report)
}

/// Training parameters of the base beside the adapters is refused rather than forgotten.
fn untrained(survey: &Survey, saved: &Saved) -> Error {
    let Parameter { path, name, .. } = &survey.tensors[saved.index];
    let (field, setting) = match &saved.reason {
        SavedFor::Module(entry) => ("modules_to_save", format!("`{entry}`")),
        SavedFor::Bias => ("bias", "its value".to_string()),
    };
    let reason = format!(
        "{setting} asks for `{path}.{name}` to be trained, and only adapters are: leave it out"
    );
    Error::Config { field, reason }
}

pub(crate) fn already_adapted(path: &str) -> Error {
    let reason = "it carries an adapter already; take it off with `remove_adapters` first";
    Error::module(path, reason)
}

/// Freezes everything and attaches adapters by their paths.
struct Attach {
    adapters: HashMap<String, LinearLoRA>,
    /// Frozen tensors by what they were, so that layers which share one still do.
    frozen: HashMap<TensorId, Tensor>,
}

impl Attach {
    fn frozen(&mut self, tensor: &Tensor) -> Tensor {
        let frozen = self.frozen.entry(tensor.id());
        frozen.or_insert_with(|| tensor.detach()).clone()
    }
}

impl Visitor for Attach {
    fn linear(&mut self, path: &ModulePath, linear: &mut Linear) -> Result<()> {
        match self.adapters.remove(path.as_str()) {
            Some(lora) => linear.adapt(lora),
            None => linear.freeze(|tensor| self.frozen(tensor)),
        }
        Ok(())
    }

    fn parameter(&mut self, _: &ModulePath, _: &str, tensor: &mut Tensor) -> Result<()> {
        *tensor = self.frozen(tensor);
        Ok(())
    }
}
