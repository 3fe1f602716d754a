//! `rank_pattern` and `alpha_pattern`: values of single layers.
//!
//! A key is a regular expression that must match the path up to its end, from its start or from
//! after a dot: PEFT's `re.match("(.*\.)?(key)$", path)`. PEFT takes the first that does, in an
//! order which its own files don't keep. So keys that would not agree are refused here, and then
//! the order means nothing.

use std::{collections::BTreeMap, fmt::Display};

use regex::Regex;

use super::{NotAdapted, type_name};
use crate::{AdapterConfig, Error, LoraTargets, Result, suggest::Nearest, survey::Site};

pub(super) struct Overrides<'a, T> {
    field: &'static str,
    keys: Vec<Key<'a, T>>,
}

struct Key<'a, T> {
    text: &'a str,
    regex: Regex,
    value: T,
    used: bool,
}

impl<'a, T: Copy + PartialEq + Display> Overrides<'a, T> {
    pub fn parse(field: &'static str, values: &'a BTreeMap<String, T>) -> Result<Self> {
        let parse = |text: &'a str, value| {
            let error = |error| {
                let reason = format!("`{text}` is no regular expression: {error}");
                Error::Config { field, reason }
            };
            // By itself first: an unbalanced key must not balance ours.
            Regex::new(text).map_err(error)?;
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).map_err(error)?;
            let used = false;
            Ok(Key {
                text,
                regex,
                value,
                used,
            })
        };
        let keys = values.iter().map(|(text, value)| parse(text, *value));
        Ok(Self {
            field,
            keys: keys.collect::<Result<_>>()?,
        })
    }

    /// The value for the adapted layer at `path`, if a key matches.
    pub fn value(&mut self, path: &str) -> Result<Option<T>> {
        let mut found: Option<(&str, T)> = None;
        for key in &mut self.keys {
            if !key.regex.is_match(path) {
                continue;
            }
            key.used = true;
            match found {
                Some((other, value)) if value != key.value => {
                    let reason = format!(
                        "`{other}` gives `{path}` {value} and `{}` gives it {}; PEFT would take \
                         the one that comes first, and may change their order when it saves: \
                         narrow one of them",
                        key.text, key.value,
                    );
                    let field = self.field;
                    return Err(Error::Config { field, reason });
                }
                Some(_) => {}
                None => found = Some((key.text, key.value)),
            }
        }
        Ok(found.map(|(_, value)| value))
    }

    /// Checks that every key matched a layer.
    pub fn check_used<M: LoraTargets>(
        &self,
        sites: &[Site],
        adapters: &[Result<AdapterConfig, NotAdapted>],
    ) -> Result<()> {
        let Some(key) = self.keys.iter().find(|key| !key.used) else {
            return Ok(());
        };
        let mut others = sites.iter().zip(adapters);
        let reason = match others.find(|(site, _)| key.regex.is_match(&site.path)) {
            Some((site, Err(why))) => format!(
                "`{}` matches no adapted layer; `{}`, which it matches, is not adapted: {why}",
                key.text, site.path,
            ),
            _ => {
                let mut nearest = Nearest::new(key.text);
                for (site, _) in sites.iter().zip(adapters).filter(|(_, it)| it.is_ok()) {
                    nearest.offer(&site.path);
                }
                let model = type_name::<M>();
                let offers = nearest.offers();
                format!(
                    "`{}` matches no adapted layer of `{model}`; nearest: {offers}",
                    key.text
                )
            }
        };
        let field = self.field;
        Err(Error::Config { field, reason })
    }
}
