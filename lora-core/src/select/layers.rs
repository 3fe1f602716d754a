//! `layers_to_transform` and `layers_pattern`: the layers of a model by their index.

use std::collections::BTreeSet;

use super::NotAdapted;
use crate::{Error, Result, config::Fields, suggest::Nearest, survey::Site};

/// The layers to adapt in.
pub(super) struct Layers<'a> {
    /// Empty: all of them.
    indices: &'a [usize],
    /// The lists that are counted in; empty: the outermost of each path.
    lists: &'a [String],
}

impl<'a> Layers<'a> {
    /// Reads the two fields and checks that every list is in the model.
    pub fn of(fields: &'a Fields, sites: &[Site]) -> Result<Self> {
        for list in &fields.layers_pattern {
            if sites
                .iter()
                .any(|site| index_in(&site.path, list).is_some())
            {
                continue;
            }
            let mut nearest = Nearest::new(list);
            for (name, _) in sites.iter().flat_map(|site| lists(&site.path)) {
                nearest.offer(name);
            }
            let reason = format!(
                "`{list}` is the name of no list of layers; nearest: {}",
                nearest.offers()
            );
            let field = "layers_pattern";
            return Err(Error::Config { field, reason });
        }
        Ok(Self {
            indices: &fields.layers_to_transform,
            lists: &fields.layers_pattern,
        })
    }

    /// Refuses a path that is in none of the layers.
    pub fn admit(&self, path: &str) -> Result<(), NotAdapted> {
        if self.indices.is_empty() {
            return Ok(());
        }
        match self.index(path) {
            Some(index) if self.indices.contains(&index) => Ok(()),
            index => Err(NotAdapted::OtherLayer(index)),
        }
    }

    /// Checks that something is adapted in every layer to transform.
    pub fn check_used(&self, sites: &[Site], chosen: &[Result<(), NotAdapted>]) -> Result<()> {
        let (mut used, mut known) = (BTreeSet::new(), BTreeSet::new());
        for (site, chosen) in sites.iter().zip(chosen) {
            match (chosen, self.index(&site.path)) {
                (Ok(()), Some(index)) => {
                    used.insert(index);
                    known.insert(index);
                }
                (Err(NotAdapted::OtherLayer(_)), Some(index)) => {
                    known.insert(index);
                }
                _ => {}
            }
        }
        let Some(index) = self.indices.iter().find(|index| !used.contains(index)) else {
            return Ok(());
        };
        let reason = if known.is_empty() {
            format!(
                "there is no layer {index}: none of the targets is in a list of layers; name the \
                 list in layers_pattern, or leave both out"
            )
        } else {
            format!(
                "layer {index} has nothing to adapt; the targets are in the layers {}",
                ranges(&known)
            )
        };
        let field = "layers_to_transform";
        Err(Error::Config { field, reason })
    }

    /// The index of the layer that the module at `path` is in.
    fn index(&self, path: &str) -> Option<usize> {
        if self.lists.is_empty() {
            return lists(path).next().map(|(_, index)| index);
        }
        self.lists.iter().find_map(|list| index_in(path, list))
    }
}

/// The index of the module at `path` in the outermost list of this name.
fn index_in(path: &str, list: &str) -> Option<usize> {
    lists(path)
        .find(|(prefix, _)| super::saved::names(list, prefix))
        .map(|(_, index)| index)
}

/// The lists that the module at `path` is in, outermost first: the path of each, and the index.
///
/// An index stands between a name and what is indexed; a number at either end of the path is none.
fn lists(path: &str) -> impl Iterator<Item = (&str, usize)> {
    let dots = path.match_indices('.').map(|(dot, _)| dot);
    dots.filter_map(move |dot| {
        let (number, _) = path[dot + 1..].split_once('.')?;
        let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
        let index = number.parse().ok().filter(|_| is_number)?;
        Some((&path[..dot], index))
    })
}

/// Numbers as people write them: `0-3, 7`.
fn ranges(numbers: &BTreeSet<usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let text = |(first, last)| match first == last {
        true => format!("{first}"),
        false => format!("{first}-{last}"),
    };
    let texts: Vec<String> = ranges.into_iter().map(text).collect();
    texts.join(", ")
}
