//! Targets and exclusions: how names and rules meet.

use lora_core::{LoraTargets, NotAdapted, PeftConfig};

use crate::model::{Paths, Transformer, adapted, reached, refusal};

#[test]
fn a_bare_name_ends_at_a_dot() {
    let paths = ["layers.1.q", "layers.11.q", "layers.1.not_q", "q", "q.x"];
    assert_eq!(
        reached(&paths, &PeftConfig::new(["q"])).unwrap(),
        ["layers.1.q", "layers.11.q", "q"]
    );
    assert_eq!(
        reached(&paths, &PeftConfig::new(["*.1.q"])).unwrap(),
        ["layers.1.q"]
    );
}

#[test]
fn a_regular_expression_covers_the_whole_path() {
    let paths = ["a.q_proj", "q_proj", "a.q_proj_b"];
    assert_eq!(
        reached(&paths, &PeftConfig::new(["re:q_proj"])).unwrap(),
        ["q_proj"]
    );
    assert_eq!(
        reached(&paths, &PeftConfig::new([r"re:.*\.q_proj"])).unwrap(),
        ["a.q_proj"]
    );
    let error = refusal(Paths::new(paths), &PeftConfig::new(["re:q_proj)|(?:b"]));
    assert!(error.contains("re:q_proj)|(?:b"), "{error}");
}

#[test]
fn exclusion_beats_targets() {
    let paths = ["0.q", "0.v", "1.q"];
    let config = PeftConfig::new(["q", "v"]).exclude(["0.q"]);
    assert_eq!(reached(&paths, &config).unwrap(), ["0.v", "1.q"]);
}

#[test]
fn excluding_everything_and_matching_nothing_are_told_apart() {
    let paths = || Paths::new(["0.q", "0.v"]);
    let all = refusal(paths(), &PeftConfig::new(["q"]).exclude(["q", "v"]));
    assert!(
        all.ends_with(r#"is left to adapt: all fall under exclude_modules ["q", "v"]"#),
        "{all}"
    );
    let none = refusal(paths(), &PeftConfig::new(["k"]));
    assert!(
        none.contains("matches `k`; nearest: `0.q`, `0.v`"),
        "{none}"
    );
    let unused = refusal(paths(), &PeftConfig::new(["q"]).exclude(["k"]));
    assert!(unused.contains("matches `k`; nearest"), "{unused}");
}

#[test]
fn all_linear_leaves_the_head_and_says_so() {
    let mut model = Transformer::new();
    let plan = model.lora_plan(&PeftConfig::all_linear()).unwrap();
    assert_eq!(plan.adapted.len(), 3 * 7 + 1);
    let [head] = plan.not_adapted.as_slice() else {
        panic!("{plan}")
    };
    assert_eq!(
        (head.path.as_str(), &head.reason),
        ("lm_head", &NotAdapted::OutputHead)
    );

    let config = PeftConfig::all_linear().exclude(["re:(layers|pooler).*"]);
    let error = refusal(Transformer::new(), &config);
    assert!(
        error.contains("exclude_modules") && error.contains("leave output heads alone"),
        "{error}"
    );
}

#[test]
fn all_linear_reaches_the_same_layers_again() {
    let mut model = Transformer::new();
    let first = model.lora_plan(&PeftConfig::all_linear()).unwrap();
    model.apply_lora(&PeftConfig::all_linear()).unwrap();
    model.remove_adapters().unwrap();
    let second = model.lora_plan(&PeftConfig::all_linear()).unwrap();
    assert_eq!(adapted(&first), adapted(&second));
}

#[test]
fn all_linear_in_a_list_is_told_how_to_be_meant() {
    let error = refusal(Paths::new(["q"]), &PeftConfig::new(["all-linear"]));
    assert!(
        error.ends_with("in a list it is a name: give it alone, or set match_all_linear"),
        "{error}"
    );
    // Unless a layer has that name.
    let config = PeftConfig::new(["all-linear"]);
    assert_eq!(
        reached(&["all-linear", "q"], &config).unwrap(),
        ["all-linear"]
    );
}
