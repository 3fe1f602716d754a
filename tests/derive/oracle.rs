//! The matcher against a regular expression, and the tree against a list of its paths.

use lora_core::{Field, Glob, TargetTree};
use proptest::prelude::*;
use regex::Regex;

/// The rule of patterns, said in another language.
fn regex(pattern: &str) -> Regex {
    let body = regex::escape(pattern).replace(r"\*", "(?s:.*)");
    let bare = !pattern.contains(['*', '.']);
    let before = if bare { r"(?s:.*\.)?" } else { "" };
    Regex::new(&format!(r"\A{before}{body}\z")).expect("an escaped pattern")
}

/// A tree without its names, which have to live forever.
#[derive(Clone, Debug)]
enum Shape {
    Empty,
    Linear,
    Fields(Vec<(String, Shape)>),
    Each(Box<Shape>),
    OneOf(Vec<Shape>),
    Keyed,
}

impl Shape {
    fn tree(&self) -> TargetTree {
        let boxed = |shape: &Shape| -> &'static TargetTree { Box::leak(Box::new(shape.tree())) };
        match self {
            Self::Empty => TargetTree::Empty,
            Self::Linear => TargetTree::Linear,
            Self::Fields(fields) => TargetTree::Fields(Vec::leak(
                fields
                    .iter()
                    .map(|(name, shape)| Field {
                        name: String::leak(name.clone()),
                        head: false,
                        tree: boxed(shape),
                    })
                    .collect(),
            )),
            Self::Each(shape) => TargetTree::Each(boxed(shape)),
            Self::OneOf(shapes) => {
                TargetTree::OneOf(Vec::leak(shapes.iter().map(Self::tree).collect()))
            }
            Self::Keyed => TargetTree::Keyed(&TargetTree::Linear),
        }
    }

    /// All paths with numbers and keys long enough for a pattern of four characters to tell.
    fn paths(&self, prefix: &str, paths: &mut Vec<String>) {
        let join = |segment: &str| match (prefix, segment) {
            (prefix, "") => prefix.to_string(),
            ("", segment) => segment.to_string(),
            (prefix, segment) => format!("{prefix}.{segment}"),
        };
        match self {
            Self::Empty => {}
            Self::Linear => paths.push(prefix.to_string()),
            Self::Fields(fields) => {
                for (name, shape) in fields {
                    shape.paths(&join(name), paths);
                }
            }
            Self::Each(shape) => {
                let numbers = words("01", 4).into_iter();
                for number in numbers.filter(|word| word == "0" || !word.starts_with('0')) {
                    shape.paths(&join(&number), paths);
                }
            }
            Self::OneOf(shapes) => shapes.iter().for_each(|shape| shape.paths(prefix, paths)),
            Self::Keyed => paths.extend(words("ab01.", 4).iter().map(|key| join(key))),
        }
    }
}

/// All words of 1 to `len` letters.
fn words(letters: &str, len: usize) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut start = 0;
    for _ in 0..len {
        let end = words.len();
        for i in start..end {
            words.extend(
                letters
                    .chars()
                    .map(|letter| format!("{}{letter}", words[i]))
                    .collect::<Vec<_>>(),
            );
        }
        start = end;
    }
    words.remove(0);
    words
}

fn shapes() -> impl Strategy<Value = Shape> {
    let leaf = prop_oneof![
        4 => Just(Shape::Linear),
        1 => Just(Shape::Empty),
        1 => Just(Shape::Keyed),
    ];
    leaf.prop_recursive(3, 8, 3, |inner| {
        prop_oneof![
            4 => prop::collection::vec(("([ab01]{1,2}(\\.[ab])?)?", inner.clone()), 0..3)
                .prop_map(Shape::Fields),
            2 => inner.clone().prop_map(|shape| Shape::Each(Box::new(shape))),
            1 => prop::collection::vec(inner, 0..3).prop_map(Shape::OneOf),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pattern_matches_what_its_regular_expression_does(
        pattern in "[ab.*01]{1,10}",
        path in "[ab.01]{0,12}",
    ) {
        let glob = Glob::new(&pattern).expect("a short pattern");
        prop_assert_eq!(glob.matches(&path), regex(&pattern).is_match(&path));
    }

    /// Random text rarely matches a long pattern; text made from the pattern does.
    #[test]
    fn a_pattern_matches_what_its_stars_may_stand_for(
        pattern in "[ab.*01]{1,10}",
        fill in "[ab.01]{0,4}",
        prefix in "([ab01]{1,2}\\.)?",
    ) {
        let path = prefix + &pattern.replace('*', &fill);
        let glob = Glob::new(&pattern).expect("a short pattern");
        prop_assert_eq!(glob.matches(&path), regex(&pattern).is_match(&path));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_contains_what_matches_one_of_its_paths(
        shape in shapes(),
        patterns in prop::collection::vec("[ab.*01]{1,4}", 8),
    ) {
        let mut paths = Vec::new();
        shape.paths("", &mut paths);
        let tree = shape.tree();
        for pattern in patterns {
            let regex = regex(&pattern);
            let matching = paths.iter().find(|path| regex.is_match(path));
            prop_assert_eq!(
                tree.contains(&pattern),
                matching.is_some(),
                "{}: {:?}", pattern, matching
            );
        }
    }
}
