//! Which linear layers a configuration names.

use std::collections::HashSet;

use regex::Regex;

use crate::{
    AdapterConfig, BiasMode, Error, Glob, LoraTargets, PeftConfig, Result,
    glob::MAX_PATTERN,
    suggest::{Nearest, no_match},
    survey::{Parameter, Site, Survey},
};

/// For each site, the adapter that `config` gives it, if any.
///
/// `exclude_modules` wins; `match_all_linear` leaves the output head alone; every pattern must
/// name something.
pub(crate) fn select<M: LoraTargets>(
    config: &PeftConfig,
    sites: &[Site],
) -> Result<Vec<Option<AdapterConfig>>> {
    let adapter = config.adapter()?;
    let targets = patterns::<M>("target_modules", config.target_modules(), sites)?;
    let excluded = patterns::<M>("exclude_modules", config.exclude_modules(), sites)?;
    let named = |patterns: &[Pattern], site: &Site| patterns.iter().any(|p| p.matches(&site.path));
    let chosen: Vec<_> = sites
        .iter()
        .map(|site| {
            let wanted = if config.match_all_linear() {
                !site.head
            } else {
                named(&targets, site)
            };
            (wanted && !named(&excluded, site)).then(|| adapter.clone())
        })
        .collect();
    if chosen.iter().any(Option::is_some) {
        return Ok(chosen);
    }
    Err(Error::NoMatch(if sites.is_empty() {
        format!("`{}` has no linear layer to adapt", type_name::<M>())
    } else {
        format!(
            "no linear layer of `{}` is left to adapt: exclude_modules {:?} names all of them",
            type_name::<M>(),
            config.exclude_modules(),
        )
    }))
}

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
/// [`select`].
pub(crate) fn select_saved<M: LoraTargets>(
    config: &PeftConfig,
    chosen: &[Option<AdapterConfig>],
    survey: &Survey,
) -> Result<Vec<Saved>> {
    let adapted: HashSet<&str> = survey
        .sites
        .iter()
        .zip(chosen)
        .filter(|(_, adapter)| adapter.is_some())
        .map(|(site, _)| site.path.as_str())
        .collect();
    let entries = &config.fields.modules_to_save;
    let reason = |parameter: &Parameter| {
        let entry = entries
            .iter()
            .find(|entry| is_below(&parameter.path, entry));
        let bias = match config.fields.bias {
            BiasMode::None => false,
            BiasMode::All => true,
            BiasMode::LoraOnly => adapted.contains(parameter.path.as_str()),
        };
        match entry {
            Some(entry) => Some(SavedFor::Module(entry.clone())),
            None if bias && parameter.name == "bias" => Some(SavedFor::Bias),
            None => None,
        }
    };
    Ok(survey
        .tensors
        .iter()
        .enumerate()
        .filter_map(|(index, parameter)| {
            let reason = reason(parameter)?;
            Some(Saved { index, reason })
        })
        .collect())
}

/// Whether the module at `path` is one that `entry` names, or below it. An entry is the path of a
/// module, or its end from a dot.
fn is_below(path: &str, entry: &str) -> bool {
    let ends = path.match_indices('.').map(|(end, _)| end);
    ends.chain([path.len()]).any(|end| {
        let parent = path[..end].strip_suffix(entry);
        parent.is_some_and(|parent| parent.is_empty() || parent.ends_with('.'))
    })
}

/// A pattern that runs over whole paths.
enum Pattern<'a> {
    Glob(Box<Glob<'a>>),
    Regex(Regex),
}

impl<'a> Pattern<'a> {
    fn parse(field: &'static str, text: &'a str) -> Result<Self> {
        let config = |reason| Error::Config { field, reason };
        if let Some(expression) = text.strip_prefix("re:") {
            let anchored = format!("^(?:{expression})$");
            let regex =
                Regex::new(&anchored).map_err(|error| config(format!("`{text}`: {error}")))?;
            return Ok(Self::Regex(regex));
        }
        let glob = Glob::new(text).ok_or_else(|| {
            config(format!(
                "`{text}` is no pattern: it must have 1 to {MAX_PATTERN} bytes"
            ))
        })?;
        Ok(Self::Glob(Box::new(glob)))
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Glob(glob) => glob.matches(path),
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

/// Reads the patterns and checks that each names a site.
fn patterns<'a, M: LoraTargets>(
    field: &'static str,
    texts: &'a [String],
    sites: &[Site],
) -> Result<Vec<Pattern<'a>>> {
    texts
        .iter()
        .map(|text| {
            let pattern = Pattern::parse(field, text)?;
            if sites.iter().any(|site| pattern.matches(&site.path)) {
                Ok(pattern)
            } else {
                Err(Error::NoMatch(unmatched::<M>(text, sites)))
            }
        })
        .collect()
}

/// The compiler's message, or, where the type would allow the name, one about this very model.
fn unmatched<M: LoraTargets>(pattern: &str, sites: &[Site]) -> String {
    let model = type_name::<M>();
    if !M::TARGETS.contains(pattern) && !pattern.starts_with("re:") {
        return no_match(&M::TARGETS, &model, pattern).as_str().to_string();
    }
    let mut nearest = Nearest::new(pattern);
    sites.iter().for_each(|site| nearest.offer(&site.path));
    nearest
        .message(&format!("this {model}"))
        .as_str()
        .to_string()
}

/// The name of a type without its modules: `Llama`, `Wrapper<Block>`.
pub(crate) fn type_name<M: ?Sized>() -> String {
    let full = std::any::type_name::<M>();
    let mut name = String::new();
    for part in full.split_inclusive(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')) {
        name.push_str(part.rsplit("::").next().unwrap_or(part));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_names_lose_their_modules() {
        assert_eq!(type_name::<Vec<Option<Error>>>(), "Vec<Option<Error>>");
        assert_eq!(type_name::<Site>(), "Site");
    }
}
