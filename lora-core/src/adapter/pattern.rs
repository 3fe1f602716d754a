//! PEFT's `rank_pattern` and `alpha_pattern`: values by regular expression.

use fancy_regex::{Regex, RegexBuilder};

/// Expressions and their values, in the order in which the first match wins.
#[derive(Clone, Debug)]
pub(super) struct Patterns<T> {
    entries: Vec<(Pattern, T)>,
    /// How many of them are no mere names.
    expressions: usize,
}

/// An expression that must match the end of a path, from a dot or the start.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    /// Characters one by one, `None` standing for any: what nearly every pattern is.
    Name {
        characters: Vec<Option<char>>,
        whole: bool,
    },
    Expression(Box<Regex>),
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            expressions: 0,
        }
    }
}

impl<T: Copy> Patterns<T> {
    /// Adds an expression after the others.
    pub fn push(&mut self, text: &str, value: T) -> Result<(), String> {
        /// Compiled expressions take memory, and a hostile file may have many.
        const MOST: usize = 256;
        let pattern = Pattern::new(text)?;
        self.expressions += usize::from(matches!(pattern.rule, Rule::Expression(_)));
        if self.expressions > MOST {
            return Err(format!("has more than {MOST} regular expressions"));
        }
        self.entries.push((pattern, value));
        Ok(())
    }

    /// The first expression that matches `path`.
    pub fn find(&self, path: &str) -> Result<Option<(&str, T)>, String> {
        for (pattern, value) in &self.entries {
            if pattern.matches(path)? {
                return Ok(Some((&pattern.text, *value)));
            }
        }
        Ok(None)
    }

    /// The expressions that match none of `paths`.
    pub fn unused<'a>(&self, paths: impl Iterator<Item = &'a String> + Clone) -> Vec<&str> {
        let unused = |pattern: &Pattern| {
            let matches = |path: &String| pattern.matches(path).unwrap_or(true);
            !paths.clone().any(matches)
        };
        self.entries
            .iter()
            .filter(|(pattern, _)| unused(pattern))
            .map(|(pattern, _)| pattern.text.as_str())
            .collect()
    }
}

impl Pattern {
    fn new(text: &str) -> Result<Self, String> {
        // What one expression may spend; one that needs more is refused by name.
        const STEPS: usize = 100_000;
        const COMPILED_BYTES: usize = 1 << 18;
        let rule = match name(text) {
            Some(rule) => rule,
            None => RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"))
                .backtrack_limit(STEPS)
                .delegate_size_limit(COMPILED_BYTES)
                .build()
                .map(|regex| Rule::Expression(Box::new(regex)))
                .map_err(|error| format!("pattern `{text}`: {error}"))?,
        };
        let text = text.to_string();
        Ok(Self { text, rule })
    }

    fn matches(&self, path: &str) -> Result<bool, String> {
        match &self.rule {
            Rule::Name { characters, whole } => {
                let mut rest = path.chars();
                let matches = characters.iter().rev().all(|wanted| {
                    let next = rest.next_back();
                    next.is_some_and(|next| wanted.is_none_or(|wanted| wanted == next))
                });
                let rest = rest.as_str();
                Ok(matches && (rest.is_empty() || !whole && rest.ends_with('.')))
            }
            Rule::Expression(regex) => regex
                .is_match(path)
                .map_err(|error| format!("pattern `{}` on `{path}`: {error}", self.text)),
        }
    }
}

/// Reads an expression of letters, dots, escaped characters and anchors; `None` for any other.
fn name(text: &str) -> Option<Rule> {
    let (text, whole) = match text.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let mut characters = Vec::new();
    let mut rest = text
        .strip_suffix('$')
        .filter(|text| !text.ends_with('\\'))
        .unwrap_or(text)
        .chars();
    while let Some(next) = rest.next() {
        characters.push(match next {
            '.' => None,
            '\\' => Some(rest.next().filter(|escaped| !escaped.is_alphanumeric())?),
            next if next.is_alphanumeric() || "_- ".contains(next) => Some(next),
            _ => return None,
        });
    }
    Some(Rule::Name { characters, whole })
}
