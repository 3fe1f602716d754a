//! `rank_pattern` and `alpha_pattern`.

use std::collections::BTreeMap;

use lora_core::{LoraTargets, PeftConfig};
use proptest::prelude::*;
use regex::Regex;

use crate::model::{Paths, ranks_and_alphas, refusal};

const PATHS: [&str; 5] = [
    "q",
    "layers.0.q",
    "layers.1.q",
    "layers.1.xq",
    "layers.1.q.k",
];

/// The ranks that one key gives, over all layers.
fn ranks(key: &str) -> Vec<usize> {
    let config = PeftConfig::new(["*"]).dim(8).rank_pattern([(key, 2)]);
    let plan = Paths::new(PATHS).lora_plan(&config).unwrap();
    plan.adapted.iter().map(|adapter| adapter.rank).collect()
}

#[test]
fn a_key_means_the_end_of_a_path_from_a_dot() {
    assert_eq!(ranks("q"), [2, 2, 2, 8, 8]);
    assert_eq!(ranks("layers.1.q"), [8, 8, 2, 8, 8]);
    assert_eq!(ranks("1.q"), [8, 8, 2, 8, 8]);
    assert_eq!(ranks("q.k"), [8, 8, 8, 8, 2]);
}

#[test]
fn a_key_is_a_regular_expression() {
    assert_eq!(ranks(".*q"), [2, 2, 2, 2, 8]);
    assert_eq!(ranks("k|xq"), [8, 8, 8, 2, 2]);
    assert_eq!(ranks("layers.1.*"), [8, 8, 2, 2, 2]);
    // A dot is any character.
    assert_eq!(ranks("layers.1.x."), [8, 8, 8, 2, 8]);
}

#[test]
fn a_caret_means_the_start_of_the_path() {
    assert_eq!(ranks("^q"), [2, 8, 8, 8, 8]);
    assert_eq!(ranks("^layers.1.q"), [8, 8, 2, 8, 8]);
}

#[test]
fn rank_and_alpha_are_looked_up_independently() {
    let config = PeftConfig::new(["q", "xq"])
        .dim(8)
        .alpha(16.0)
        .rank_pattern([("^q", 2), ("xq", 3)])
        .alpha_pattern([("layers.0.q", 5.0), ("xq", 0.5)]);
    let plan = Paths::new(PATHS).lora_plan(&config).unwrap();
    let want = [
        ("q", (2, 16.0)),
        ("layers.0.q", (8, 5.0)),
        ("layers.1.q", (8, 16.0)),
        ("layers.1.xq", (3, 0.5)),
    ];
    let want: BTreeMap<_, _> = want.map(|(path, it)| (path.to_string(), it)).into();
    assert_eq!(ranks_and_alphas(&plan), want);
}

#[test]
fn what_is_applied_is_what_was_planned() {
    let mut model = Paths::new(PATHS);
    let config = PeftConfig::new(["q"])
        .rank_pattern([("^q", 1)])
        .alpha_pattern([("1.q", 3.0)]);
    let planned = ranks_and_alphas(&model.lora_plan(&config).unwrap());
    let report = model.apply_lora(&config).unwrap();
    let applied = report
        .sites
        .into_iter()
        .map(|site| (site.path, (site.rank, site.alpha)));
    assert_eq!(applied.collect::<BTreeMap<_, _>>(), planned);
    assert_eq!(model.get("q").lora().unwrap().lora_a().dims(), [1, 3]);
}

#[test]
fn keys_that_disagree_about_a_layer_are_an_error_in_either_order() {
    for keys in [
        [("layers.1.q", 2), (".*q", 16)],
        [(".*q", 16), ("layers.1.q", 2)],
    ] {
        let config = PeftConfig::new(["q"]).rank_pattern(keys);
        assert_eq!(
            refusal(Paths::new(PATHS), &config),
            "PeftConfig.rank_pattern: `.*q` gives `layers.1.q` 16 and `layers.1.q` gives it 2; \
             PEFT would take the one that comes first, and may change their order when it saves: \
             narrow one of them"
        );
    }
    let config = PeftConfig::new(["q"]).alpha_pattern([("q", 1.0), ("1.q", 1.5)]);
    let error = refusal(Paths::new(PATHS), &config);
    assert!(
        error.starts_with("PeftConfig.alpha_pattern: `1.q` gives `layers.1.q` 1.5"),
        "{error}"
    );
}

#[test]
fn keys_may_overlap_where_they_agree_or_where_nothing_is_adapted() {
    let agree = PeftConfig::new(["q"]).rank_pattern([("q", 2), (".*q", 2)]);
    assert!(Paths::new(PATHS).lora_plan(&agree).is_ok());
    let elsewhere = PeftConfig::new(["k", "q"])
        .exclude(["layers.1.q"])
        .rank_pattern([("layers.*q", 2), ("(layers.1.)?q.k", 3), ("^q", 4)]);
    assert!(Paths::new(PATHS).lora_plan(&elsewhere).is_ok());
}

#[test]
fn a_key_that_reaches_nothing_is_an_error() {
    for (key, message) in [
        (
            "layers.1.p",
            "`layers.1.p` matches no adapted layer of `Paths`; nearest: `layers.1.q`",
        ),
        (
            "xq",
            "`xq` matches no adapted layer; `layers.1.xq`, which it matches, is not adapted: not \
             targeted",
        ),
        ("", "`` matches no adapted layer of `Paths`; nearest: "),
        ("(", "`(` is no regular expression: "),
        // Balanced only by the parentheses around it.
        ("q)|(k", "`q)|(k` is no regular expression: "),
        ("(?=q)q", "`(?=q)q` is no regular expression: "),
    ] {
        let config = PeftConfig::new(["q"]).rank_pattern([(key, 2)]);
        let error = refusal(Paths::new(PATHS), &config);
        let message = format!("PeftConfig.rank_pattern: {message}");
        assert!(error.starts_with(&message), "{error}\nlacks\n{message}");
        let config = PeftConfig::new(["q"]).alpha_pattern([(key, 2.0)]);
        let error = refusal(Paths::new(PATHS), &config);
        assert!(error.starts_with("PeftConfig.alpha_pattern: "), "{error}");
    }
}

/// PEFT's rule in other words: the key covers what follows the start, or any dot.
fn covers_an_end(key: &str, path: &str) -> bool {
    let key = Regex::new(&format!(r"\A(?:{key})\z")).expect("a sound key");
    let dots = path.match_indices('.').map(|(dot, _)| dot + 1);
    dots.chain([0]).any(|start| key.is_match(&path[start..]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_has_the_value_of_the_keys_that_cover_an_end_of_its_path(
        paths in prop::collection::btree_set("[ab](\\.[ab01]){0,3}", 1..6),
        keys in prop::collection::btree_map("([ab01.]|\\.\\*|[ab]\\|){1,4}[ab01]", 1usize..4, 0..3),
    ) {
        let values = |path: &str| -> Vec<usize> {
            let covering = keys.iter().filter(|(key, _)| covers_an_end(key, path));
            covering.map(|(_, value)| *value).collect()
        };
        let disagree = |path: &String| values(path).windows(2).any(|pair| pair[0] != pair[1]);
        let idle = |key: &String| !paths.iter().any(|path| covers_an_end(key, path));
        let config = PeftConfig::new(["*"]).dim(8).rank_pattern(keys.clone());
        match Paths::new(paths.clone()).lora_plan(&config) {
            Ok(plan) => {
                prop_assert!(!paths.iter().any(disagree) && !keys.keys().any(idle));
                for adapter in plan.adapted {
                    let want = values(&adapter.path).first().copied().unwrap_or(8);
                    prop_assert_eq!(adapter.rank, want, "{}", adapter.path);
                }
            }
            Err(error) => {
                let wrong = paths.iter().any(disagree) || keys.keys().any(idle);
                prop_assert!(wrong, "{}", error);
            }
        }
    }
}
