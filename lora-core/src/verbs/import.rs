//! An adapter into a model.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use candle_core::{DType, Tensor};

use super::{roster::switch, swap::swap};
use crate::{
    BiasMode, Error, LoraAdapter, LoraReport, LoraTargets, Result,
    adapter::{AdapterWeights, Fingerprint},
    apply::{Addition, attach, switch_for},
    config::is_adapter_dtype,
    select::type_name,
    suggest::{Nearest, nearest_names},
    survey::{Parameter, Site, Survey},
};

/// The body of [`LoraTargets::import_adapter`].
pub(crate) fn import<M: LoraTargets>(
    model: &mut M,
    name: &str,
    weights: &AdapterWeights,
) -> Result<LoraReport> {
    let found = Found::default();
    add(model, name, weights, found)?.map_err(|problems| Error::adapter(name, problems.join("; ")))
}

/// What a folder said of the weights before the model is asked.
#[derive(Default)]
pub(crate) struct Found {
    pub problems: Vec<String>,
    /// Layers that the folder has, though not whole.
    pub incomplete: BTreeSet<String>,
    /// Of weights of the base that stand in the folder, by `<module path>.<parameter>`.
    pub base: BTreeMap<String, Fingerprint>,
}

/// Adds an adapter, or says everything that is wrong with it.
pub(crate) fn add<M: LoraTargets>(
    model: &mut M,
    name: &str,
    weights: &AdapterWeights,
    found: Found,
) -> Result<Result<LoraReport, Vec<String>>> {
    let survey = Survey::of(model)?;
    let switch = switch_for(model, name)?;
    let addition = match addition::<M>(&survey, weights, found)? {
        Ok(addition) => addition,
        Err(problems) => return Ok(Err(problems)),
    };
    let mut report = attach(model, &survey, &switch, name, addition)?;
    report.notes.clone_from(&weights.notes);
    Ok(Ok(report))
}

/// What an adapter adds to a model, or everything that is wrong with it.
fn addition<M: LoraTargets>(
    survey: &Survey,
    weights: &AdapterWeights,
    found: Found,
) -> Result<Result<Addition, Vec<String>>> {
    let mut addition = Addition::new(weights.into());
    let mut problems = found.problems;
    let sites: HashMap<&str, &Site> = survey
        .sites
        .iter()
        .map(|site| (site.path.as_str(), site))
        .collect();
    let dropout = (weights.dropout, weights.dropout_position);
    if !(0.0..1.0).contains(&weights.dropout) {
        problems.push(format!(
            "the dropout {} is no probability below 1",
            weights.dropout
        ));
    }
    for (path, layer) in &weights.layers {
        let Some(site) = sites.get(path.as_str()) else {
            problems.push(unknown_layer::<M>(path, survey));
            continue;
        };
        match LoraAdapter::of(addition.id, path, &site.weight, layer, dropout) {
            Ok(lora) => drop(addition.loras.insert(path.clone(), lora)),
            Err(problem) => problems.push(problem),
        }
    }
    for (key, tensor) in &weights.saved {
        let fits = parameter(survey, key).and_then(|parameter| fits(parameter, key, tensor));
        let added = fits.and_then(|parameter| {
            let tensor = tensor.to_device(parameter.tensor.device());
            let add = |tensor: Tensor| match sites.get(parameter.path.as_str()) {
                Some(_) => addition.train(&parameter.path, &parameter.name, &tensor),
                None => {
                    let tensor = tensor.to_dtype(parameter.tensor.dtype())?;
                    addition.save(key.clone(), &parameter.tensor, &tensor)
                }
            };
            tensor
                .map_err(Error::from)
                .and_then(add)
                .map_err(|error| error.to_string())
        });
        problems.extend(added.err());
    }
    for (key, fingerprint) in &found.base {
        match parameter(survey, key) {
            Ok(ours) => problems.extend(other_weight(ours, key, fingerprint)?),
            Err(problem) => problems.push(problem),
        }
    }
    problems.extend(unpaired(&addition, survey, weights.bias));
    let nothing = addition.loras.is_empty() && addition.trained.is_empty();
    if nothing && problems.is_empty() {
        problems.push(match addition.parameters.is_empty() {
            true => "it has no tensors at all".to_string(),
            false => "it has nothing for a linear layer; an adapter is kept there".to_string(),
        });
    }
    for path in &found.incomplete {
        if !sites.contains_key(path.as_str()) {
            problems.push(unknown_layer::<M>(path, survey));
        }
    }
    if problems.is_empty() {
        problems.extend(other_base(survey, weights)?);
    }
    problems.sort();
    Ok(if problems.is_empty() {
        Ok(addition)
    } else {
        Err(problems)
    })
}

/// Says that an adapter was trained on another base, if it was.
pub(super) fn other_base(survey: &Survey, weights: &AdapterWeights) -> Result<Option<String>> {
    let Some(theirs) = &weights.origin.fingerprint else {
        return Ok(None);
    };
    let adapted = survey
        .sites
        .iter()
        .filter(|site| weights.layers.contains_key(&site.path));
    let adapted: Vec<&Site> = adapted.collect();
    // What f16 made of a base can't be told from another base.
    if adapted.iter().any(|site| site.weight.dtype() == DType::F16) {
        return Ok(None);
    }
    let ours = Fingerprint::of(adapted.iter().map(|site| (&*site.path, &site.weight)))?;
    Ok((ours != *theirs).then(|| {
        format!(
            "it was trained on another base, whose fingerprint is {theirs}; this one's is {ours}. \
             To use it all the same, `AdapterWeights::read` it, clear `origin.fingerprint` and \
             import it"
        )
    }))
}

/// Says that a weight of the base, which stands in an adapter's file, is another in the model.
fn other_weight(ours: &Parameter, key: &str, theirs: &Fingerprint) -> Result<Option<String>> {
    // As for the whole base.
    if ours.tensor.dtype() == DType::F16 {
        return Ok(None);
    }
    let same = Fingerprint::of([(key, &ours.tensor)])? == *theirs;
    Ok((!same).then(|| {
        format!(
            "`{key}` of the base is in the file, and the model's is another: it was trained on \
             another base. To use it all the same, `AdapterWeights::read` it and import it"
        )
    }))
}

/// The body of [`LoraTargets::load_adapter`] where the model has the adapter already: its numbers
/// are replaced by those of one that is the same in all else.
pub(crate) fn replace<M: LoraTargets>(
    model: &mut M,
    name: &str,
    weights: &AdapterWeights,
    found: Found,
) -> Result<Result<(), Vec<String>>> {
    let survey = Survey::of(model)?;
    let switch = switch(model)?;
    switch.unmerged()?;
    let id = switch.read().pick(name)?.id;
    let incomplete = found.incomplete.clone();
    let mut problems = addition::<M>(&survey, weights, found)?
        .err()
        .unwrap_or_default();
    let mut homeless: BTreeSet<&str> = weights.layers.keys().map(String::as_str).collect();
    homeless.retain(|path| survey.sites.iter().any(|site| site.path == *path));
    model.for_each_linear(&mut |path, linear| {
        let path = path.as_str();
        let Some(old) = linear.adapted().and_then(|lora| lora.lora(id)) else {
            return Ok(());
        };
        homeless.remove(path);
        match weights.layers.get(path) {
            None if incomplete.contains(path) || old.is_idle() => {}
            None => problems.push(format!("`{path}.lora_A.weight` is missing")),
            Some(new) if (new.rank(), new.scaling()) != (old.rank(), old.scaling()) => {
                problems.push(format!(
                    "`{path}` has rank {} and scaling {} in the file, {} and {} in the model",
                    new.rank(),
                    new.scaling(),
                    old.rank(),
                    old.scaling(),
                ));
            }
            Some(_) => {}
        }
        Ok(())
    })?;
    let bare = homeless.into_iter();
    problems.extend(bare.map(|path| format!("`{path}` carries no adapter in the model")));
    if !problems.is_empty() {
        problems.sort();
        return Ok(Err(problems));
    }
    swap(model, name, weights)?;
    model.for_each_linear(&mut |_, linear| {
        if let Some(lora) = linear.adapted_mut().and_then(|lora| lora.lora_mut(id)) {
            lora.set_training(false);
        }
        Ok(())
    })?;
    Ok(Ok(()))
}

/// The message about a layer that the model does not have.
fn unknown_layer<M: LoraTargets>(path: &str, survey: &Survey) -> String {
    let mut nearest = Nearest::new(path);
    survey
        .sites
        .iter()
        .for_each(|site| nearest.offer(&site.path));
    nearest.message("", &type_name::<M>()).as_str().to_string()
}

/// The parameter that a key names.
fn parameter<'a>(survey: &'a Survey, key: &str) -> Result<&'a Parameter, String> {
    let named = |parameter: &&Parameter| {
        key.strip_suffix(&parameter.name)
            .and_then(|path| path.strip_suffix('.'))
            .is_some_and(|path| path == parameter.path)
    };
    survey.tensors.iter().find(named).ok_or_else(|| {
        let keys: Vec<String> = survey
            .tensors
            .iter()
            .map(|parameter| format!("{}.{}", parameter.path, parameter.name))
            .collect();
        let nearest = nearest_names(key, keys.iter().map(String::as_str));
        format!("the model has no parameter `{key}`; nearest: {nearest}")
    })
}

/// The parameter, if `tensor` can take its place.
fn fits<'a>(parameter: &'a Parameter, key: &str, tensor: &Tensor) -> Result<&'a Parameter, String> {
    if tensor.dims() != parameter.tensor.dims() {
        return Err(format!(
            "`{key}` has shape {:?}; the model's has {:?}",
            tensor.dims(),
            parameter.tensor.dims()
        ));
    }
    if !is_adapter_dtype(tensor.dtype()) || !is_adapter_dtype(parameter.tensor.dtype()) {
        return Err(format!(
            "`{key}` is of {} in the adapter and {} in the model; floats alone can be trained",
            tensor.dtype().as_str(),
            parameter.tensor.dtype().as_str()
        ));
    }
    Ok(parameter)
}

/// Linear layers of which a part alone is there, though it is not by `bias`.
fn unpaired(addition: &Addition, survey: &Survey, bias: BiasMode) -> Vec<String> {
    let biased: HashSet<&str> = survey
        .sites
        .iter()
        .filter(|site| site.bias.is_some())
        .map(|site| site.path.as_str())
        .collect();
    let mut problems = Vec::new();
    for (path, trained) in &addition.trained {
        if trained.weight.is_none() && bias == BiasMode::None {
            problems.push(format!("`{path}.weight` is missing beside `{path}.bias`"));
        }
        if trained.bias.is_none() && biased.contains(path.as_str()) {
            problems.push(format!("`{path}.bias` is missing beside `{path}.weight`"));
        }
    }
    problems
}
