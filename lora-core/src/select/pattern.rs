//! Patterns of `target_modules` and `exclude_modules`.

use regex::Regex;

use crate::{Error, Glob, Result, glob::MAX_PATTERN};

/// A pattern that runs over whole paths.
pub(super) struct Pattern<'a> {
    text: &'a str,
    rule: Rule<'a>,
}

enum Rule<'a> {
    Glob(Box<Glob<'a>>),
    Regex(Regex),
}

impl<'a> Pattern<'a> {
    pub fn parse(field: &'static str, text: &'a str) -> Result<Self> {
        let config = |reason| Error::Config { field, reason };
        let rule = if let Some(expression) = text.strip_prefix("re:") {
            // By itself first: one with a parenthesis too many could leave the anchors.
            let compiled = Regex::new(expression)
                .and_then(|_| Regex::new(&format!("^(?:{expression})$")))
                .map_err(|error| config(format!("`{text}`: {error}")))?;
            Rule::Regex(compiled)
        } else {
            Rule::Glob(Box::new(Glob::new(text).ok_or_else(|| {
                config(format!(
                    "`{text}` is no pattern: it must have 1 to {MAX_PATTERN} bytes"
                ))
            })?))
        };
        Ok(Self { text, rule })
    }

    pub fn text(&self) -> &'a str {
        self.text
    }

    pub fn matches(&self, path: &str) -> bool {
        match &self.rule {
            Rule::Glob(glob) => glob.matches(path),
            Rule::Regex(regex) => regex.is_match(path),
        }
    }
}
