//! `adapter_config.json`: each field understood, or refused by name.

use std::{collections::BTreeMap, fs};

use candle_core::{DType, Tensor};
use lora_core::adapter::AdapterWeights;
use lora_tests::randn;
use serde_json::{Value, json};

use crate::support::*;

/// Reads with a configuration given as text.
fn read_text(text: &str, tensors: &BTreeMap<String, Tensor>) -> Result<AdapterWeights, String> {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), &json!({}), tensors);
    fs::write(dir.path().join(CONFIG), text).unwrap();
    AdapterWeights::read(dir.path()).map_err(|error| error.to_string())
}

fn of_rank(layers: &[(&str, usize)]) -> BTreeMap<String, Tensor> {
    let pair = |(path, rank): &(&str, usize)| {
        [("lora_A", (*rank, 6)), ("lora_B", (4, *rank))].map(|(name, shape)| {
            (
                format!("base_model.model.{path}.{name}.weight"),
                randn(1, shape, DType::F32),
            )
        })
    };
    layers.iter().flat_map(pair).collect()
}

#[test]
fn a_minimal_configuration_means_rank_8_and_alpha_8() {
    let text = r#"{"peft_type": "LORA", "target_modules": ["q"]}"#;
    let adapter = read_text(text, &of_rank(&[("q", 8)])).unwrap();
    assert_eq!(
        (adapter.layers["q"].rank(), adapter.layers["q"].alpha),
        (8, 8.0)
    );
    let error = read_text(text, &of_rank(&[("q", 4)])).unwrap_err();
    assert_says(
        &error,
        &[
            "q.lora_A.weight` has shape [4, 6]",
            "with rank 8 (by r being absent",
        ],
    );
}

#[test]
fn fields_that_would_be_lost_are_refused_by_name() {
    for (key, value, part) in [
        ("peft_type", json!("LOHA"), "must be \"LORA\""),
        ("use_dora", json!(true), "DoRA"),
        ("fan_in_fan_out", json!(true), "transposed"),
        ("target_parameters", json!(["experts.w"]), "experts"),
        ("trainable_token_indices", json!([1]), "embedding"),
        ("alora_invocation_tokens", json!([1]), "token"),
        ("layer_replication", json!([[0, 1]]), "repeated"),
        ("use_qalora", json!(true), "grouped"),
        ("use_bdlora", json!({"nblocks": 2}), "block"),
        ("arrow_config", json!({"top_k": 3}), "routed"),
        ("ensure_weight_tying", json!(true), "tied"),
        ("megatron_config", json!({"x": 1}), "Megatron"),
        ("velora_config", json!({"x": 1}), "gradients"),
        ("monteclora_config", json!({"x": 1}), "sampled"),
        ("kasa_config", json!({"x": 1}), "base"),
        ("something_of_tomorrow", json!({"on": 1}), "unknown"),
        (
            "init_lora_weights",
            json!("pissa"),
            "path_initial_model_for_weight_conversion",
        ),
        (
            "init_lora_weights",
            json!("pissa_niter_16"),
            "path_initial_model",
        ),
        ("init_lora_weights", json!("olora"), "path_initial_model"),
        ("init_lora_weights", json!("corda"), "path_initial_model"),
        ("init_lora_weights", json!("loftq"), "path_initial_model"),
        ("init_lora_weights", json!("lora_ga"), "path_initial_model"),
        ("init_lora_weights", json!("of_tomorrow"), "not supported"),
        ("task_type", json!("POETRY"), "CAUSAL_LM"),
        ("bias", json!("some"), "lora_only"),
        ("r", json!(0), "from 1 on"),
        ("r", json!(-3), "from 1 on"),
        ("r", json!("8"), "from 1 on"),
        ("r", json!(1e300), "from 1 on"),
        ("lora_alpha", json!("8"), "no number"),
        ("lora_dropout", json!(1.5), "no probability"),
        ("use_rslora", json!("yes"), "neither true nor false"),
        ("rank_pattern", json!({"q": 0}), "from 1 on"),
        ("rank_pattern", json!([1]), "no object"),
        ("rank_pattern", json!({"(": 2}), "pattern `(`"),
        ("alpha_pattern", json!({"q": "x"}), "no number"),
        ("modules_to_save", json!("head"), "no list"),
        ("target_modules", json!([1]), "no text"),
    ] {
        let error = refusal(&config(json!({ key: value })), &q_proj());
        assert_says(&error, &[CONFIG, key, part]);
    }
}

#[test]
fn all_refused_fields_are_told_at_once() {
    let error = refusal(&json!({"use_dora": true, "r": 0, "bias": "x"}), &q_proj());
    assert_says(
        &error,
        &["use_dora", "r: 0", "bias: \"x\"", "peft_type is missing"],
    );
}

#[test]
fn fields_at_rest_and_fields_of_provenance_are_no_obstacle() {
    let fields = json!({
        "something_of_tomorrow": null, "another": [], "third": false, "fourth": {}, "fifth": "",
        "auto_mapping": {"base_model_class": "X"}, "peft_version": "0.21", "megatron_core": "x",
        "qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": true},
        "loftq_config": {"loftq_bits": 4}, "init_lora_weights": "gaussian", "inference_mode": false,
        "layers_to_transform": [0], "layers_pattern": "layers", "lora_alpha": null, "bias": null,
        "fan_in_fan_out": false, "exclude_modules": ".*head",
    });
    let adapter = read(&config(fields), &q_proj()).unwrap();
    assert_eq!(adapter.layers["q_proj"].alpha, 8.0);
    assert_says(&adapter.notes.join("; "), &["exclude_modules"]);
    for init in [
        json!(true),
        json!(false),
        json!(null),
        json!("orthogonal"),
        json!("eva"),
    ] {
        read(&config(json!({"init_lora_weights": init})), &q_proj()).unwrap();
    }
}

#[test]
fn patterns_follow_pefts_rule() {
    let layers = [
        ("model.layers.1.q", 3),
        ("model.layers.11.q", 2),
        ("q", 5),
        ("x.not_q", 2),
        ("x.k", 4),
    ];
    let read = |patterns: &str| {
        let text = format!(r#"{{"peft_type": "LORA", "r": 2, "rank_pattern": {patterns}}}"#);
        read_text(&text, &of_rank(&layers))
    };
    // The first that matches wins; bounded on the left by a dot or the start, and `^` means that.
    read(r#"{"^q": 5, "layers.1.q": 3, "k|z": 4}"#).unwrap();
    read(r#"{"layers.1.q": 3, "^q$": 5, "x\\.k": 4, "layers.1.q|never": 9}"#).unwrap();
    read(r#"{"(?<!x\\.)(?:layers\\.1\\.q)": 3, "^(q)": 5, "[k]": 4}"#).unwrap();
    // The order of the file counts, not that of the alphabet.
    let error = read(r#"{"q": 2, "layers.1.q": 3, "^q": 5, "k": 4}"#).unwrap_err();
    assert_says(
        &error,
        &[
            "model.layers.1.q.lora_A.weight` has shape [3, 6]",
            "rank_pattern `q`",
        ],
    );
}

#[test]
fn rank_and_alpha_are_looked_up_on_their_own_and_idle_patterns_noted() {
    let fields = json!({"rank_pattern": {"q": 4, "z": 4}, "alpha_pattern": {"k": 5, "y": 1.5}, "lora_alpha": 3});
    let adapter = read(&config(fields), &of_rank(&[("q", 4), ("k", 2)])).unwrap();
    assert_eq!(adapter.layers["q"].scaling(), 0.75);
    assert_eq!(adapter.layers["k"].scaling(), 2.5);
    assert_eq!(
        adapter.notes,
        [
            "rank_pattern: `z` matches no layer",
            "alpha_pattern: `y` matches no layer"
        ]
    );
}

#[test]
fn patterns_that_explode_are_refused_in_little_time() {
    let path = "a".repeat(60);
    let fields = json!({"rank_pattern": {"(?=b)(a|aa)+$|(?:(a+)+\\1)+b": 2}});
    let error = refusal(&config(fields), &of_rank(&[(&path, 2)]));
    assert_says(&error, &["rank_pattern", "(a+)+"]);
    let many: serde_json::Map<_, _> = (0..300).map(|i| (format!("(x){i}"), json!(2))).collect();
    let error = refusal(&config(json!({ "rank_pattern": many })), &q_proj());
    assert_says(&error, &["rank_pattern", "256"]);
    let error = refusal(
        &config(json!({"rank_pattern": {"(a{1000}){1000}": 2}})),
        &q_proj(),
    );
    assert_says(&error, &["rank_pattern", "a{1000}"]);
}

#[test]
fn a_key_that_stands_twice_is_refused() {
    for (text, key) in [
        (r#"{"peft_type": "LORA", "r": 2, "r": 2}"#, "`r`"),
        (
            r#"{"peft_type": "LORA", "r": 2, "rank_pattern": {"q": 2, "q": 2}}"#,
            "`q`",
        ),
    ] {
        let error = read_text(text, &q_proj()).unwrap_err();
        assert_says(&error, &[CONFIG, key, "twice"]);
    }
}

#[test]
fn broken_json_is_named_with_its_file() {
    let deep = format!("{{\"x\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    for text in [
        "",
        "{",
        "[]",
        "null",
        "{\"r\": NaN}",
        "{\"r\": 1e999}",
        "\u{0}",
        &deep,
    ] {
        let error = read_text(text, &q_proj()).unwrap_err();
        assert_says(&error, &[CONFIG]);
    }
}

#[test]
fn a_lora_bias_must_be_there_if_and_only_if_it_is_set() {
    let mut tensors = q_proj();
    let key = "base_model.model.q_proj.lora_B.bias";
    let set = config(json!({"lora_bias": true}));
    assert_says(&refusal(&set, &tensors), &[key, "missing"]);
    tensors.insert(key.into(), randn(1, 3, DType::F32));
    assert_says(&refusal(&set, &tensors), &[key, "must be [4]"]);
    tensors.insert(key.into(), randn(1, 4, DType::F32));
    assert!(
        read(&set, &tensors).unwrap().layers["q_proj"]
            .bias
            .is_some()
    );
    assert_says(
        &refusal(&config(json!({})), &tensors),
        &[key, "lora_bias is not set"],
    );
}

#[test]
fn targets_without_tensors_and_tensors_without_targets_are_noted() {
    let fields = json!({"target_modules": ["layers.0.q_proj", "k_proj"]});
    let adapter = read(&config(fields), &q_proj()).unwrap();
    assert_eq!(
        adapter.notes,
        [
            "target_modules: `layers.0.q_proj` has no tensors",
            "target_modules: `k_proj` has no tensors",
            "target_modules doesn't name `q_proj`, which has tensors",
        ]
    );
    for target in [
        json!("all-linear"),
        json!(".*q_proj"),
        Value::Null,
        json!(["q_proj"]),
    ] {
        let adapter = read(&config(json!({"target_modules": target})), &q_proj()).unwrap();
        assert_eq!(adapter.notes, Vec::<String>::new());
    }
}
