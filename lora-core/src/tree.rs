//! What a type offers for adaptation, known at compile time.

use crate::glob::{Glob, States};

/// The linear layers of a type, as a tree of path segments.
///
/// `#[derive(LoraTargets)]` writes one per type as a constant that refers to those of the field
/// types, so that target names can be checked while compiling.
///
/// ```
/// use lora_core::{LoraTargets, TargetTree, nn::Linear};
///
/// #[derive(LoraTargets)]
/// struct Attention { q_proj: Linear, v_proj: Linear }
/// #[derive(LoraTargets)]
/// struct Model { layers: Vec<Attention>, #[lora(head)] lm_head: Linear }
///
/// const TREE: TargetTree = Model::TARGETS;
/// const { assert!(TREE.contains("*.q_proj") && !TREE.contains("*.k_proj")) };
/// assert_eq!(TREE.paths(), ["layers.*.q_proj", "layers.*.v_proj", "lm_head"]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetTree {
    /// No linear layer below.
    Empty,
    /// A linear layer.
    Linear,
    /// Named children.
    Fields(&'static [Field]),
    /// Children named by their index: lists.
    Each(&'static TargetTree),
    /// Children named by a key: maps.
    Keyed(&'static TargetTree),
    /// One of several shapes at the same path: the variants of an enum.
    OneOf(&'static [TargetTree]),
}

/// A named child of a [`TargetTree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The path segment, or several joined by dots; empty if the field adds none.
    pub name: &'static str,
    /// Whether the linear layers below are the model's output head.
    pub head: bool,
    /// What is below.
    pub tree: &'static TargetTree,
}

impl TargetTree {
    /// Whether `pattern` names at least one linear layer that the type can have.
    pub const fn contains(&self, pattern: &str) -> bool {
        match Glob::new(pattern) {
            Some(glob) => self.accepts(&glob, glob.start(), true),
            None => false,
        }
    }

    /// Walks the automaton over every path below. `first` tells that no segment was entered yet.
    const fn accepts(&self, glob: &Glob<'_>, states: States, first: bool) -> bool {
        if states.is_dead() {
            return false;
        }
        match self {
            Self::Empty => false,
            Self::Linear => glob.accepts(states),
            Self::Fields(fields) => {
                let mut i = 0;
                while i < fields.len() {
                    let Field { name, tree, .. } = fields[i];
                    let found = if name.is_empty() {
                        tree.accepts(glob, states, first)
                    } else {
                        let states = glob.text(separated(glob, states, first), name);
                        tree.accepts(glob, states, false)
                    };
                    if found {
                        return true;
                    }
                    i += 1;
                }
                false
            }
            Self::Each(tree) => {
                let states = glob.any_number(separated(glob, states, first));
                tree.accepts(glob, states, false)
            }
            Self::Keyed(tree) => {
                let states = glob.any_text(separated(glob, states, first));
                tree.accepts(glob, states, false)
            }
            Self::OneOf(trees) => {
                let mut i = 0;
                while i < trees.len() {
                    if trees[i].accepts(glob, states, first) {
                        return true;
                    }
                    i += 1;
                }
                false
            }
        }
    }

    /// The paths of all linear layers, with `*` for an index or a key, in declaration order and
    /// without repetition.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect("", &mut paths);
        paths
    }

    fn collect(&self, prefix: &str, paths: &mut Vec<String>) {
        let join = |segment: &str| match (prefix, segment) {
            (prefix, "") => prefix.to_string(),
            ("", segment) => segment.to_string(),
            (prefix, segment) => format!("{prefix}.{segment}"),
        };
        match self {
            Self::Empty => {}
            Self::Linear => {
                if !paths.iter().any(|path| path == prefix) {
                    paths.push(prefix.to_string());
                }
            }
            Self::Fields(fields) => {
                for field in *fields {
                    field.tree.collect(&join(field.name), paths);
                }
            }
            Self::Each(tree) | Self::Keyed(tree) => tree.collect(&join("*"), paths),
            Self::OneOf(trees) => trees.iter().for_each(|tree| tree.collect(prefix, paths)),
        }
    }
}

const fn separated(glob: &Glob<'_>, states: States, first: bool) -> States {
    if first {
        states
    } else {
        glob.text(states, ".")
    }
}
