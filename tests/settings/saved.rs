//! `modules_to_save` and `bias`: what is trained whole, and what is then not adapted.

use lora_core::{BiasMode, LoraPlan, LoraTargets, NotAdapted, PeftConfig, TrainedFor};

use crate::model::{INNER, Paths, Transformer, WIDTH, WORDS, adapted};

fn plan(config: PeftConfig) -> LoraPlan {
    Transformer::new().lora_plan(&config).unwrap()
}

fn error(config: PeftConfig) -> String {
    Transformer::new()
        .lora_plan(&config)
        .unwrap_err()
        .to_string()
}

/// The names of what is trained whole.
fn trained(plan: &LoraPlan) -> Vec<String> {
    let name = |it: &lora_core::PlannedTensor| format!("{}.{}", it.path, it.name);
    plan.trained.iter().map(name).collect()
}

#[test]
fn a_saved_module_wins_over_targets() {
    let plan = plan(PeftConfig::new(["q_proj", "lm_head"]).modules_to_save(["lm_head"]));
    assert!(!adapted(&plan).contains(&"lm_head"));
    let head = plan
        .not_adapted
        .iter()
        .find(|it| it.path == "lm_head")
        .unwrap();
    assert_eq!(head.reason, NotAdapted::Saved("lm_head".into()));
    assert_eq!(trained(&plan), ["lm_head.weight"]);
    assert_eq!(plan.trained[0].parameters, WORDS * WIDTH);
    assert_eq!(
        plan.trained[0].reason,
        TrainedFor::ModulesToSave("lm_head".into())
    );
}

#[test]
fn nothing_below_a_saved_module_is_adapted() {
    let plan = plan(PeftConfig::all_linear().modules_to_save(["pooler", "1.mlp"]));
    for path in adapted(&plan) {
        assert!(
            !path.starts_with("pooler.") && !path.starts_with("layers.1.mlp."),
            "{path}"
        );
    }
    let want = [
        "layers.1.mlp.gate.weight",
        "layers.1.mlp.experts.0.up_proj.weight",
        "layers.1.mlp.experts.0.down_proj.weight",
        "layers.1.mlp.experts.1.up_proj.weight",
        "layers.1.mlp.experts.1.down_proj.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "pooler.norm.weight",
        "pooler.norm.bias",
    ];
    assert_eq!(trained(&plan), want);
    assert_eq!(plan.trained[1].parameters, INNER * WIDTH);
}

#[test]
fn a_name_is_a_whole_segment_at_the_end_of_a_path() {
    let saved = |name: &str| trained(&plan(PeftConfig::new(["q_proj"]).modules_to_save([name])));
    // PEFT would take `head` for `lm_head`.
    let wrong = error(PeftConfig::new(["q_proj"]).modules_to_save(["head"]));
    assert!(
        wrong.starts_with(
            "PeftConfig.modules_to_save: `head` names no module of `Transformer`; nearest: `"
        ),
        "{wrong}"
    );
    assert_eq!(saved("embed"), ["embed.weight"]);
    assert_eq!(
        saved("pooler.norm"),
        ["pooler.norm.weight", "pooler.norm.bias"]
    );
    assert_eq!(saved("norm").len(), 2 * 4);
    assert_eq!(
        saved("1.norm"),
        ["layers.1.norm.weight", "layers.1.norm.bias"]
    );
}

#[test]
fn a_name_that_is_of_no_module_is_an_error_with_the_nearest() {
    for (name, nearest) in [
        ("lm_haed", "`lm_head`"),
        ("lm_head.weight", "`lm_head`"),
        ("poler", "`pooler`"),
        ("", "nearest: "),
    ] {
        let error = error(PeftConfig::new(["q_proj"]).modules_to_save(["pooler", name]));
        let start = format!("PeftConfig.modules_to_save: `{name}` names no module");
        assert!(
            error.starts_with(&start) && error.contains(nearest),
            "{error}"
        );
    }
}

#[test]
fn a_model_saved_whole_has_nothing_left_to_adapt() {
    let error = error(
        PeftConfig::new(["q_proj"])
            .exclude(["layers.0.*"])
            .modules_to_save(["layers"]),
    );
    assert!(
        error.contains("is left to adapt") && error.contains("modules_to_save"),
        "{error}"
    );
}

#[test]
fn biases_are_trained_as_the_mode_says() {
    let with = |mode| trained(&plan(PeftConfig::new(["q_proj", "v_proj"]).bias(mode)));
    assert!(with(BiasMode::None).is_empty());
    assert_eq!(
        with(BiasMode::LoraOnly),
        [
            "layers.0.q_proj.bias",
            "layers.1.q_proj.bias",
            "layers.2.q_proj.bias"
        ]
    );
    let all = [
        "layers.0.norm.bias",
        "layers.0.q_proj.bias",
        "layers.1.norm.bias",
        "layers.1.q_proj.bias",
        "layers.2.norm.bias",
        "layers.2.q_proj.bias",
        "pooler.dense.bias",
        "pooler.norm.bias",
    ];
    assert_eq!(with(BiasMode::All), all);
}

#[test]
fn a_bias_in_a_saved_module_is_trained_once() {
    let plan = plan(
        PeftConfig::new(["q_proj"])
            .modules_to_save(["pooler"])
            .bias(BiasMode::All),
    );
    let mut names = trained(&plan);
    let reason = |name: &str| {
        let at = names.iter().position(|it| it == name).unwrap();
        plan.trained[at].reason.clone()
    };
    assert_eq!(
        reason("pooler.dense.bias"),
        TrainedFor::ModulesToSave("pooler".into())
    );
    assert_eq!(reason("layers.0.norm.bias"), TrainedFor::Bias);
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn a_bias_mode_that_finds_no_bias_is_an_error() {
    let wrong = error(PeftConfig::new(["v_proj"]).bias(BiasMode::LoraOnly));
    assert_eq!(
        wrong,
        "PeftConfig.bias: no adapted layer of `Transformer` has a bias; set none"
    );
    let config = PeftConfig::new(["q"]).bias(BiasMode::All);
    let wrong = Paths::new(["q"]).lora_plan(&config).unwrap_err();
    assert_eq!(
        wrong.to_string(),
        "PeftConfig.bias: no layer of `Paths` has a bias; set none"
    );
}
