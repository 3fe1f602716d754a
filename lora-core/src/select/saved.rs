//! `modules_to_save` and `bias`: parameters of the base that are trained whole.

use std::collections::HashSet;

use super::type_name;
use crate::{
    AdapterConfig, BiasMode, Error, LoraTargets, PeftConfig, Result,
    suggest::Nearest,
    survey::{Parameter, Survey},
};

/// A parameter of the base that is trained whole, beside the adapters.
#[derive(Debug)]
pub(crate) struct Saved {
    /// Its place in [`Survey::tensors`].
    pub index: usize,
    pub reason: SavedFor,
}

/// Why a parameter of the base is trained whole.
#[derive(Debug)]
pub(crate) enum SavedFor {
    /// This entry of `modules_to_save` names its module, or one above.
    Module(String),
    /// `bias` asks for it.
    Bias,
}

/// The parameters of the base that `config` trains whole, in the model's order, with `chosen` from
/// [`select`](super::select).
///
/// # Errors
/// If an entry of `modules_to_save` names no module, or `bias` finds none.
pub(crate) fn select_saved<M: LoraTargets>(
    config: &PeftConfig,
    chosen: &[Option<AdapterConfig>],
    survey: &Survey,
) -> Result<Vec<Saved>> {
    let (entries, bias) = (&config.fields.modules_to_save, config.fields.bias);
    check_entries::<M>(entries, &survey.tensors)?;
    let sites = survey.sites.iter().zip(chosen);
    let adapted: HashSet<&str> = sites
        .filter(|(_, adapter)| adapter.is_some())
        .map(|(site, _)| site.path.as_str())
        .collect();
    let is_trained_bias = |parameter: &Parameter| {
        parameter.name == "bias"
            && match bias {
                BiasMode::None => false,
                BiasMode::All => true,
                BiasMode::LoraOnly => adapted.contains(parameter.path.as_str()),
            }
    };
    if bias != BiasMode::None && !survey.tensors.iter().any(is_trained_bias) {
        let model = type_name::<M>();
        let reason = match bias {
            BiasMode::LoraOnly => format!("no adapted layer of `{model}` has a bias; set none"),
            _ => format!("no layer of `{model}` has a bias; set none"),
        };
        let field = "bias";
        return Err(Error::Config { field, reason });
    }
    let saved = |(index, parameter): (usize, &Parameter)| {
        let reason = match entry_above(entries, &parameter.path) {
            Some(entry) => SavedFor::Module(entry.to_string()),
            None if is_trained_bias(parameter) => SavedFor::Bias,
            None => return None,
        };
        Some(Saved { index, reason })
    };
    Ok(survey
        .tensors
        .iter()
        .enumerate()
        .filter_map(saved)
        .collect())
}

/// The entry that names the module at `path`, or one above it.
pub(super) fn entry_above<'a>(entries: &'a [String], path: &str) -> Option<&'a str> {
    let names_one = |entry: &&String| modules_above(path).any(|module| names(entry, module));
    entries.iter().find(names_one).map(String::as_str)
}

/// Whether `entry` is `path`, or its end from a dot.
pub(super) fn names(entry: &str, path: &str) -> bool {
    path.strip_suffix(entry)
        .is_some_and(|parent| parent.is_empty() || parent.ends_with('.'))
}

/// The module at `path` and those that hold it, outermost first.
fn modules_above(path: &str) -> impl Iterator<Item = &str> {
    let ends = path.match_indices('.').map(|(dot, _)| dot);
    ends.chain([path.len()]).map(|end| &path[..end])
}

/// Checks that every entry names a module.
fn check_entries<M: LoraTargets>(entries: &[String], parameters: &[Parameter]) -> Result<()> {
    let modules = || parameters.iter().flat_map(|it| modules_above(&it.path));
    let unknown = |entry: &&String| !modules().any(|module| names(entry, module));
    let Some(entry) = entries.iter().find(unknown) else {
        return Ok(());
    };
    let mut nearest = Nearest::new(entry);
    let is_named = |it: &&Parameter| names(entry, &format!("{}.{}", it.path, it.name));
    match parameters.iter().find(is_named) {
        Some(parameter) => nearest.offer(&parameter.path),
        None => modules().for_each(|module| nearest.offer(module)),
    }
    let reason = format!(
        "`{entry}` names no module of `{}`; nearest: {}",
        type_name::<M>(),
        nearest.offers(),
    );
    let field = "modules_to_save";
    Err(Error::Config { field, reason })
}
