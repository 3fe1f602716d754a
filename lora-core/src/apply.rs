//! Attaching adapters.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use candle_core::{Tensor, TensorId, Var};

use crate::{
    AdapterConfig, Error, LinearLoRA, LoraAdapter, LoraReport, LoraSite, LoraTargets, ModulePath,
    PeftConfig, Result, Visitor,
    join::switch_of,
    nn::Linear,
    op::compute_dtype,
    saved::{SavedParameter, SavedParameters},
    select::{select, select_saved},
    survey::Survey,
    switch::{About, AdapterId, DEFAULT, Entry, Switch},
    trained::Trained,
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
    if linear.adapted().is_some() {
        return Err(already_adapted(path));
    }
    let (weight, bias) = (linear.weight().clone(), linear.bias().cloned());
    linear.adapt(LinearLoRA::new(path, weight, bias, config)?);
    Ok(())
}

/// The body of [`LoraTargets::apply_lora`].
pub(crate) fn apply<M: LoraTargets>(model: &mut M, config: &PeftConfig) -> Result<LoraReport> {
    check_unapplied(model)?;
    let report = add(model, DEFAULT, config)?;
    model.set_adapter(DEFAULT)?;
    Ok(report)
}

/// Refuses a model that [`apply`] has been to.
pub(crate) fn check_unapplied<M: LoraTargets>(model: &mut M) -> Result<()> {
    if let Some(switch) = switch_of(model)?
        && let Ok(pick) = switch.read().pick(DEFAULT)
    {
        return Err(already_adapted(&first_site(model, pick.id)?));
    }
    Ok(())
}

/// The body of [`LoraTargets::add_adapter`].
pub(crate) fn add<M: LoraTargets>(
    model: &mut M,
    name: &str,
    config: &PeftConfig,
) -> Result<LoraReport> {
    config.validate()?;
    let survey = Survey::of(model)?;
    let switch = switch_for(model, name)?;
    let chosen = select::<M>(config, &survey.sites)?;
    let saved = select_saved::<M>(config, &chosen, &survey)?;
    let mut addition = Addition::new(About {
        bias: config.fields.bias,
        modules_to_save: config.fields.modules_to_save.clone(),
        ..About::default()
    });
    for (site, adapter) in survey.sites.iter().zip(chosen) {
        if let Some(adapter) = adapter {
            let lora = LoraAdapter::fresh(addition.id, &site.path, &site.weight, &adapter)?;
            addition.loras.insert(site.path.clone(), lora);
        }
    }
    for saved in saved {
        let parameter = &survey.tensors[saved.index];
        let (path, tensor) = (&parameter.path, &parameter.tensor);
        if survey.sites.iter().any(|site| site.path == *path) {
            // As adapters do, it learns in f32 over a half type.
            let dtype = compute_dtype(tensor.dtype());
            addition.train(path, &parameter.name, &tensor.detach().to_dtype(dtype)?)?;
        } else {
            addition.save(format!("{path}.{}", parameter.name), tensor, tensor)?;
        }
    }
    attach(model, &survey, &switch, name, addition)
}

/// The switch of a model that can get another adapter called `name`.
pub(crate) fn switch_for<M: LoraTargets>(model: &mut M, name: &str) -> Result<Arc<Switch>> {
    let switch = switch_of(model)?.unwrap_or_else(Switch::new);
    switch.unmerged()?;
    switch.read().check_new(name)?;
    Ok(switch)
}

/// Everything that a new adapter has, before it is anywhere.
pub(crate) struct Addition {
    pub id: AdapterId,
    pub about: About,
    /// By the paths of their layers, as the following.
    pub loras: HashMap<String, LoraAdapter>,
    pub trained: HashMap<String, Trained>,
    /// By `<module path>.<parameter>`.
    pub parameters: BTreeMap<String, SavedParameter>,
}

impl Addition {
    pub fn new(about: About) -> Self {
        Self {
            id: AdapterId::fresh(),
            about,
            loras: HashMap::new(),
            trained: HashMap::new(),
            parameters: BTreeMap::new(),
        }
    }

    /// Adds a parameter of the linear layer at `path`, which begins as `tensor`.
    pub fn train(&mut self, path: &str, name: &str, tensor: &Tensor) -> Result<()> {
        let var = Some(Var::from_tensor(&tensor.detach())?);
        let trained = self.trained.entry(path.to_string()).or_insert(Trained {
            id: self.id,
            weight: None,
            bias: None,
        });
        if name == "weight" {
            trained.weight = var;
        } else {
            trained.bias = var;
        }
        Ok(())
    }

    /// Adds a parameter outside of linear layers, which begins as `tensor`.
    pub fn save(&mut self, key: String, original: &Tensor, tensor: &Tensor) -> Result<()> {
        let parameter = SavedParameter {
            original: original.detach(),
            trained: Var::from_tensor(&tensor.detach())?,
        };
        self.parameters.insert(key, parameter);
        Ok(())
    }

    fn report(&self, survey: &Survey) -> LoraReport {
        let sites = survey.sites.iter().filter_map(|site| {
            let lora = self.loras.get(&site.path)?;
            Some(LoraSite::of(&site.path, lora))
        });
        let trained = self.trained.values().flat_map(Trained::vars);
        let trained = trained.map(|(_, var)| var.elem_count()).sum::<usize>();
        let saved = self.parameters.values();
        let saved = saved
            .map(|parameter| parameter.trained.elem_count())
            .sum::<usize>();
        LoraReport {
            sites: sites.collect(),
            base_parameters: survey.parameters,
            saved_parameters: trained + saved,
            notes: Vec::new(),
        }
    }
}

/// Freezes everything and attaches the adapter, which is not active yet. Either all of it happens
/// or none.
pub(crate) fn attach<M: LoraTargets>(
    model: &mut M,
    survey: &Survey,
    switch: &Arc<Switch>,
    name: &str,
    addition: Addition,
) -> Result<LoraReport> {
    let report = addition.report(survey);
    let Addition {
        id,
        about,
        loras,
        trained,
        parameters,
    } = addition;
    let entry = Entry {
        about,
        replaces: trained.keys().cloned().collect(),
        ..Entry::new(name)
    };
    if let Some(key) = parameters.keys().next() {
        check_can_save(switch, name, key)?;
    }
    let mut attach = Attach {
        switch: switch.clone(),
        loras,
        trained,
        frozen: HashMap::new(),
    };
    model.patch_linear(&mut ModulePath::root(), &mut attach)?;
    let mut state = switch.write();
    state.insert(id, entry);
    if !parameters.is_empty() {
        state.saved = Some(SavedParameters {
            owner: id,
            placed: false,
            parameters,
        });
    }
    Ok(report)
}

/// Refuses a parameter outside of linear layers if another adapter has such already.
pub(crate) fn check_can_save(switch: &Switch, name: &str, key: &str) -> Result<()> {
    let state = switch.read();
    let Some(saved) = &state.saved else {
        return Ok(());
    };
    let reason = format!(
        "can't train `{key}`, which is no linear layer's: `{}` has such parameters already, and \
         one adapter of a model can",
        state.name(saved.owner)
    );
    Err(Error::adapter(name, reason))
}

fn already_adapted(path: &str) -> Error {
    let reason = "it carries an adapter already; take it off with `remove_adapters` first";
    Error::module(path, reason)
}

/// The path of the first layer that has something of an adapter.
fn first_site<M: LoraTargets>(model: &mut M, id: AdapterId) -> Result<String> {
    let mut first = None;
    model.for_each_linear(&mut |path, linear| {
        let has = |lora: &LinearLoRA| lora.lora(id).is_some() || lora.trained(id).is_some();
        if first.is_none() && linear.adapted().is_some_and(has) {
            first = Some(path.to_string());
        }
        Ok(())
    })?;
    Ok(first.unwrap_or_default())
}

/// Freezes everything and attaches what an adapter has by its paths.
struct Attach {
    switch: Arc<Switch>,
    loras: HashMap<String, LoraAdapter>,
    trained: HashMap<String, Trained>,
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
        linear.freeze(|tensor| self.frozen(tensor));
        let lora = self.loras.remove(path.as_str());
        let trained = self.trained.remove(path.as_str());
        if lora.is_some() || trained.is_some() {
            linear.attach(path.as_str(), &self.switch, lora, trained);
        }
        Ok(())
    }

    fn parameter(&mut self, path: &ModulePath, name: &str, tensor: &mut Tensor) -> Result<()> {
        let placed = match &self.switch.read().saved {
            Some(saved) => saved.placed && saved.parameters.contains_key(&format!("{path}.{name}")),
            None => false,
        };
        if !placed {
            *tensor = self.frozen(tensor);
        }
        Ok(())
    }
}
