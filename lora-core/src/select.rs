//! What a configuration makes of the layers of a model, and why.

mod layers;
mod overrides;
mod pattern;
mod saved;

use std::fmt;

use serde::{Deserialize, Serialize};

pub(crate) use self::saved::{SavedFor, select_saved};
use self::{layers::Layers, overrides::Overrides, pattern::Pattern, saved::entry_above};
use crate::{
    AdapterConfig, Error, LoraTargets, PeftConfig, Result,
    suggest::{Nearest, no_match},
    survey::Site,
};

/// Why a linear layer gets no adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NotAdapted {
    /// It is trained whole: this entry of `modules_to_save` names it, or a module above it.
    Saved(String),
    /// This pattern of `exclude_modules` names it.
    Excluded(String),
    /// It is the output head, which `match_all_linear` leaves alone.
    OutputHead,
    /// No target names it.
    NotTargeted,
    /// It is in the layer of this index, which is not in `layers_to_transform`; or in none.
    OtherLayer(Option<usize>),
}

impl fmt::Display for NotAdapted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Saved(entry) => write!(f, "trained whole, by modules_to_save `{entry}`"),
            Self::Excluded(pattern) => write!(f, "excluded by `{pattern}`"),
            Self::OutputHead => f.write_str("the output head"),
            Self::NotTargeted => f.write_str("not targeted"),
            Self::OtherLayer(Some(index)) => write!(f, "layer {index} is not to be transformed"),
            Self::OtherLayer(None) => f.write_str("in no layer to be transformed"),
        }
    }
}

/// For each site, the adapter that `config` gives it, if any.
pub(crate) fn select<M: LoraTargets>(
    config: &PeftConfig,
    sites: &[Site],
) -> Result<Vec<Option<AdapterConfig>>> {
    let choices = choose::<M>(config, sites)?;
    Ok(choices.into_iter().map(Result::ok).collect())
}

/// For each site, the adapter that `config` gives it, or why it gives none.
///
/// `modules_to_save` and `exclude_modules` win over targets; `match_all_linear` leaves the output
/// head alone; every entry of every field must do something.
pub(crate) fn choose<M: LoraTargets>(
    config: &PeftConfig,
    sites: &[Site],
) -> Result<Vec<Result<AdapterConfig, NotAdapted>>> {
    let (adapter, fields) = (config.adapter()?, &config.fields);
    let targets = patterns::<M>("target_modules", config.target_modules(), sites)?;
    let excluded = patterns::<M>("exclude_modules", config.exclude_modules(), sites)?;
    let layers = Layers::of(fields, sites)?;

    let unless_of_other_layers = |site: &Site| {
        if let Some(entry) = entry_above(&fields.modules_to_save, &site.path) {
            return Err(NotAdapted::Saved(entry.to_string()));
        }
        if let Some(pattern) = excluded.iter().find(|p| p.matches(&site.path)) {
            return Err(NotAdapted::Excluded(pattern.text().to_string()));
        }
        if config.match_all_linear() {
            if site.head {
                return Err(NotAdapted::OutputHead);
            }
        } else if !targets.iter().any(|p| p.matches(&site.path)) {
            return Err(NotAdapted::NotTargeted);
        }
        Ok(())
    };
    let wanted: Vec<Result<(), NotAdapted>> = sites.iter().map(unless_of_other_layers).collect();
    if !wanted.iter().any(Result::is_ok) {
        return Err(nothing_left::<M>(config, &wanted));
    }
    let is_target = |path: &str| config.target_modules().iter().any(|target| target == path);
    let mut chosen = Vec::new();
    for (site, wanted) in sites.iter().zip(wanted) {
        chosen.push(match wanted {
            Ok(()) if !is_target(&site.path) => layers.admit(&site.path),
            wanted => wanted,
        });
    }
    layers.check_used(sites, &chosen)?;

    let mut ranks = Overrides::parse("rank_pattern", &fields.rank_pattern)?;
    let mut alphas = Overrides::parse("alpha_pattern", &fields.alpha_pattern)?;
    let mut adapters = Vec::new();
    for (site, chosen) in sites.iter().zip(chosen) {
        adapters.push(match chosen {
            Ok(()) => Ok(AdapterConfig {
                dim: ranks.value(&site.path)?.unwrap_or(adapter.dim),
                alpha: alphas.value(&site.path)?.unwrap_or(adapter.alpha),
                ..adapter.clone()
            }),
            Err(reason) => Err(reason),
        });
    }
    ranks.check_used::<M>(sites, &adapters)?;
    alphas.check_used::<M>(sites, &adapters)?;
    Ok(adapters)
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
    let mut message = if !M::TARGETS.contains(pattern) && !pattern.starts_with("re:") {
        no_match(&M::TARGETS, &model, pattern).as_str().to_string()
    } else {
        let mut nearest = Nearest::new(pattern);
        sites.iter().for_each(|site| nearest.offer(&site.path));
        nearest.message("this ", &model).as_str().to_string()
    };
    if pattern.eq_ignore_ascii_case("all-linear") {
        message += "; in a list it is a name: give it alone, or set match_all_linear";
    }
    message
}

fn nothing_left<M: LoraTargets>(config: &PeftConfig, wanted: &[Result<(), NotAdapted>]) -> Error {
    let model = type_name::<M>();
    if wanted.is_empty() {
        return Error::NoMatch(format!("`{model}` has no linear layer to adapt"));
    }
    let because = |reason: fn(&NotAdapted) -> bool, text: String| {
        let found = wanted.iter().any(|left| left.as_ref().is_err_and(reason));
        found.then_some(text)
    };
    let reasons: Vec<String> = [
        because(
            |left| matches!(left, NotAdapted::Excluded(_)),
            format!("exclude_modules {:?}", config.exclude_modules()),
        ),
        because(
            |left| matches!(left, NotAdapted::Saved(_)),
            format!("modules_to_save {:?}", config.fields.modules_to_save),
        ),
        because(
            |left| matches!(left, NotAdapted::OutputHead),
            "the rule of match_all_linear, to leave output heads alone".to_string(),
        ),
    ]
    .into_iter()
    .flatten()
    .collect();
    Error::NoMatch(format!(
        "no linear layer of `{model}` is left to adapt: all fall under {}",
        reasons.join(" and "),
    ))
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
