//! `layers_to_transform` and `layers_pattern`.

use lora_core::{LoraTargets, NotAdapted, PeftConfig};
use proptest::prelude::*;

use crate::model::{Paths, Transformer, adapted, reached, refusal};

#[test]
fn layer_0_and_lists_of_layers_are_chosen() {
    let paths = ["m.layers.0.q", "m.layers.1.q", "m.layers.10.q"];
    let config =
        |indices: &[usize]| PeftConfig::new(["q"]).layers_to_transform(indices.iter().copied());
    assert_eq!(reached(&paths, &config(&[0])).unwrap(), ["m.layers.0.q"]);
    assert_eq!(
        reached(&paths, &config(&[10, 1])).unwrap(),
        ["m.layers.1.q", "m.layers.10.q"]
    );
    assert_eq!(reached(&paths, &config(&[])).unwrap(), paths);
}

#[test]
fn the_index_of_an_expert_is_not_that_of_a_layer() {
    let config = PeftConfig::new(["up_proj"]).layers_to_transform([2]);
    let plan = Transformer::new().lora_plan(&config).unwrap();
    assert_eq!(
        adapted(&plan),
        [
            "layers.2.mlp.experts.0.up_proj",
            "layers.2.mlp.experts.1.up_proj"
        ]
    );
}

#[test]
fn a_named_list_is_counted_in_instead_of_the_outermost() {
    let config = PeftConfig::new(["up_proj"])
        .layers_to_transform([1])
        .layers_pattern(["experts"]);
    let plan = Transformer::new().lora_plan(&config).unwrap();
    let want = (0..3).map(|i| format!("layers.{i}.mlp.experts.1.up_proj"));
    assert_eq!(adapted(&plan), want.collect::<Vec<_>>());
    // The path of a list names it too, and the first name that a path has counts.
    let paths = ["enc.layer.0.q", "dec.layer.1.q", "dec.layer.1.h.0.q"];
    let config = |names: &[&str]| {
        PeftConfig::new(["q"])
            .layers_to_transform([0])
            .layers_pattern(names.iter().copied())
    };
    assert_eq!(
        reached(&paths, &config(&["enc.layer"])).unwrap(),
        ["enc.layer.0.q"]
    );
    assert_eq!(
        reached(&paths, &config(&["h", "layer"])).unwrap(),
        ["enc.layer.0.q", "dec.layer.1.h.0.q"]
    );
    assert_eq!(
        reached(&paths, &config(&["layer", "h"])).unwrap(),
        ["enc.layer.0.q"]
    );
}

#[test]
fn layers_at_the_root_have_an_index() {
    let paths = ["layers.0.q", "layers.1.q"];
    let config = PeftConfig::new(["q"]).layers_to_transform([1]);
    assert_eq!(reached(&paths, &config).unwrap(), ["layers.1.q"]);
}

#[test]
fn the_whole_path_of_a_layer_holds_whatever_its_index() {
    let paths = ["lm_head", "m.layers.0.q", "m.layers.1.q", "m.layers.1.v"];
    let config = PeftConfig::new(["lm_head", "q", "m.layers.1.v"]).layers_to_transform([0]);
    assert_eq!(
        reached(&paths, &config).unwrap(),
        ["lm_head", "m.layers.0.q", "m.layers.1.v"]
    );
}

#[test]
fn layers_not_chosen_are_told_with_their_index() {
    let config = PeftConfig::new(["*q_proj", "*dense"]).layers_to_transform([1]);
    let plan = Transformer::new().lora_plan(&config).unwrap();
    let reason = |path: &str| {
        let skipped = plan.not_adapted.iter().find(|it| it.path == path);
        skipped.unwrap().reason.clone()
    };
    assert_eq!(reason("layers.2.q_proj"), NotAdapted::OtherLayer(Some(2)));
    assert_eq!(reason("pooler.dense"), NotAdapted::OtherLayer(None));
    assert_eq!(reason("layers.1.v_proj"), NotAdapted::NotTargeted);
}

#[test]
fn all_linear_of_some_layers_is_possible() {
    let config = PeftConfig::all_linear().layers_to_transform([1]);
    let plan = Transformer::new().lora_plan(&config).unwrap();
    assert!(
        adapted(&plan)
            .iter()
            .all(|path| path.starts_with("layers.1."))
    );
    assert_eq!(plan.adapted.len(), 7);
}

#[test]
fn an_index_or_a_list_that_is_not_there_is_an_error() {
    let paths = || Paths::new(["lm_head", "m.layers.0.q", "m.layers.1.q", "m.layers.3.q"]);
    let q = PeftConfig::new(["q"]);
    for (config, message) in [
        (
            q.clone().layers_to_transform([0, 7]),
            "PeftConfig.layers_to_transform: layer 7 has nothing to adapt; the targets are in \
             the layers 0-1, 3",
        ),
        (
            q.clone().exclude(["*.1.q"]).layers_to_transform([0, 1]),
            "PeftConfig.layers_to_transform: layer 1 has nothing to adapt; the targets are in \
             the layers 0, 3",
        ),
        (
            PeftConfig::new(["*head"]).layers_to_transform([0]),
            "PeftConfig.layers_to_transform: there is no layer 0: none of the targets is in a \
             list of layers",
        ),
        (
            q.clone().layers_to_transform([0]).layers_pattern(["layer"]),
            "PeftConfig.layers_pattern: `layer` is the name of no list of layers; nearest: \
             `m.layers`",
        ),
        (
            q.clone()
                .layers_to_transform([0])
                .layers_pattern(["layers", "h"]),
            "PeftConfig.layers_pattern: `h` is the name of no list of layers; nearest: `m.layers`",
        ),
    ] {
        let error = refusal(paths(), &config);
        assert!(error.starts_with(message), "{error}\nlacks\n{message}");
    }
}

/// The rule by segments: a number with a name before it and something behind.
fn outermost(path: &str) -> Option<usize> {
    let segments: Vec<&str> = path.split('.').collect();
    let index = |triple: &[&str]| triple[1].parse::<usize>().ok();
    segments.windows(3).find_map(index)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_outermost_index_decides(
        paths in prop::collection::btree_set("([a-c]\\.([0-3]\\.)?){0,3}q", 1..8),
        index in 0usize..4,
    ) {
        let config = PeftConfig::new(["*q"]).layers_to_transform([index]);
        let got = Paths::new(paths.clone()).lora_plan(&config);
        let want: Vec<_> = paths.iter().filter(|path| outermost(path) == Some(index)).collect();
        match got {
            Ok(plan) => prop_assert_eq!(adapted(&plan), want),
            Err(error) => prop_assert!(want.is_empty(), "{}", error),
        }
    }
}
