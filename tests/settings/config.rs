//! The configuration itself: how it is read and written, and which fields go together.

use std::{collections::HashMap, fs};

use candle_core::DType;
use lora_core::{BiasMode, LoraInit, LoraTargets, PeftConfig};
use lora_tests::randn;
use serde_json::{Value, json};

use crate::model::{Paths, read};

/// A configuration with every field of PEFT's set.
fn full() -> PeftConfig {
    PeftConfig::new(["q_proj", "v_proj"])
        .lora_a_init(LoraInit::RandomB)
        .use_rslora(true)
        .rank_pattern([("v_proj", 4), ("layers.1.q_proj", 2)])
        .alpha_pattern([("q_proj", 12.0), ("v_proj", 0.1)])
        .layers_to_transform([0, 1])
        .layers_pattern(["layers"])
        .modules_to_save(["lm_head"])
        .bias(BiasMode::LoraOnly)
        .lora_bias(true)
}

#[test]
fn a_round_trip_through_json_is_exact() {
    let mut configs = vec![full(), PeftConfig::new(["a"]).bias(BiasMode::All)];
    configs.extend(
        ["xavier", "kaiming", "gaussian", "orthogonal", "false"]
            .map(|name| PeftConfig::new(["a"]).lora_a_init(name.parse().unwrap())),
    );
    for config in configs {
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<PeftConfig>(&text).unwrap(), config);
        let dict = config.to_dict().unwrap();
        assert_eq!(PeftConfig::from_dict(&dict).unwrap(), config);
        assert_eq!(serde_json::to_string(&config).unwrap(), text);
    }
}

#[test]
fn fields_have_pefts_names_and_values() {
    let dict = Value::Object(full().to_dict().unwrap());
    for (field, value) in [
        ("use_rslora", json!(true)),
        ("rank_pattern", json!({"v_proj": 4, "layers.1.q_proj": 2})),
        ("alpha_pattern", json!({"q_proj": 12, "v_proj": 0.1})),
        ("layers_to_transform", json!([0, 1])),
        ("layers_pattern", json!(["layers"])),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("lora_A_init", json!(false)),
    ] {
        assert_eq!(dict[field], value, "{field}");
    }
}

#[test]
fn fields_that_are_not_set_are_not_written() {
    let dict = PeftConfig::new(["a"]).to_dict().unwrap();
    assert!(!dict.contains_key("rank_pattern") && !dict.contains_key("bias"));
    assert_eq!(dict.len(), 11);
}

#[test]
fn one_value_a_list_and_null_are_read_alike() {
    let with = |field: &str, value: Value| {
        let mut fields = json!({"target_modules": ["a"], "layers_to_transform": [0]});
        fields[field] = value;
        read(fields).unwrap()
    };
    for (field, one) in [
        ("layers_to_transform", json!(0)),
        ("layers_pattern", json!("h")),
        ("modules_to_save", json!("lm_head")),
        ("exclude_modules", json!("b")),
    ] {
        assert_eq!(
            with(field, one.clone()),
            with(field, json!([one])),
            "{field}"
        );
        if field != "layers_to_transform" {
            assert_eq!(with(field, json!(null)), with(field, json!([])), "{field}");
        }
    }
    let nulls = json!({
        "target_modules": ["a"], "rank_pattern": null, "alpha_pattern": null,
        "layers_to_transform": null,
    });
    assert_eq!(read(nulls).unwrap(), PeftConfig::new(["a"]));
}

#[test]
fn pefts_init_lora_weights_is_read() {
    for (value, init) in [
        (json!(true), LoraInit::Kaiming),
        (json!(false), LoraInit::RandomB),
        (json!("gaussian"), LoraInit::Gaussian),
        (json!("orthogonal"), LoraInit::Orthogonal),
    ] {
        let config = read(json!({"target_modules": ["a"], "init_lora_weights": value})).unwrap();
        assert_eq!(config, PeftConfig::new(["a"]).lora_a_init(init));
    }
}

#[test]
fn all_linear_in_any_case_is_match_all_linear() {
    for spelling in ["all-linear", "All-Linear", "ALL-LINEAR"] {
        let config = read(json!({"target_modules": spelling})).unwrap();
        assert_eq!(config, PeftConfig::all_linear());
        assert_eq!(config.to_dict().unwrap()["match_all_linear"], json!(true));
    }
    // In a list it is the name of a layer.
    let config = read(json!({"target_modules": ["all-linear"]})).unwrap();
    assert_eq!(config, PeftConfig::new(["all-linear"]));
}

#[test]
fn what_does_not_go_together_is_refused_with_the_field_and_the_way_out() {
    for (fields, message) in [
        (
            json!({"layers_pattern": "layers"}),
            "PeftConfig.layers_pattern: says which list layers_to_transform counts in: give",
        ),
        (
            json!({"target_modules": "re:.*q_proj", "layers_to_transform": 1}),
            "PeftConfig.layers_to_transform: does not go with the regular expression `re:.*q_proj`",
        ),
        (
            json!({"lora_bias": true, "init_lora_weights": "gaussian"}),
            "PeftConfig.lora_bias: an adapter with a bias can't begin as by `gaussian`; set",
        ),
        (
            json!({"lora_bias": true, "init_lora_weights": "orthogonal"}),
            "PeftConfig.lora_bias: an adapter with a bias can't begin as by `orthogonal`; set",
        ),
        (
            json!({"init_lora_weights": "orthogonal", "dim": 5}),
            "PeftConfig.dim: the rank is 5; lora_A_init `orthogonal` halves it, so that it must be even",
        ),
        (
            json!({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}),
            "PeftConfig.rank_pattern: `q`: the rank is 3; lora_A_init `orthogonal`",
        ),
        (
            json!({"rank_pattern": {"q": 0}}),
            "PeftConfig.rank_pattern: `q`: the rank is 0; it must be at least 1",
        ),
        (
            json!({"alpha_pattern": {"q": -1}}),
            "PeftConfig.alpha_pattern: `q`: -1 is no positive number",
        ),
        (
            json!({"target_modules": "all-linear", "match_all_linear": false, "dim": 0}),
            "PeftConfig.dim: ",
        ),
    ] {
        let mut whole = json!({"target_modules": ["q_proj"]});
        let whole_map = whole.as_object_mut().unwrap();
        whole_map.extend(fields.as_object().unwrap().clone());
        let error = read(whole).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}\nlacks\n{message}");
    }
    for init in ["xavier", "kaiming", "false"] {
        let fields = json!({"target_modules": ["a"], "lora_bias": true, "lora_A_init": init});
        read(fields).unwrap();
    }
}

#[test]
fn what_a_field_cannot_be_is_refused() {
    for (fields, message) in [
        (
            json!({"bias": "some"}),
            "unknown variant `some`, expected one of `none`, `all`, `lora_only`",
        ),
        (
            json!({"layers_to_transform": -1}),
            "layers_to_transform: expected the index of a layer",
        ),
        (
            json!({"layers_to_transform": "1"}),
            "layers_to_transform: expected the index of a layer",
        ),
        (json!({"rank_pattern": ["q"]}), "expected a map of patterns"),
        (json!({"rank_pattern": {"q": 1.5}}), "1.5"),
        (
            json!({"init_lora_weights": "pissa"}),
            "unknown initialisation `pissa`",
        ),
        (
            json!({"init_lora_weights": 1}),
            "expected the name of an initialisation, true or false",
        ),
        (json!({"use_dora": true}), "unknown field `use_dora`"),
        (
            json!({"lora_A_init": true, "init_lora_weights": true}),
            "duplicate field",
        ),
    ] {
        let mut whole = json!({"target_modules": ["a"]});
        let whole_map = whole.as_object_mut().unwrap();
        whole_map.extend(fields.as_object().unwrap().clone());
        let error = read(whole).unwrap_err().to_string();
        assert!(error.contains(message), "{error}\nlacks\n{message}");
    }
}

#[test]
fn a_pattern_that_is_given_twice_is_refused() {
    let text = r#"{"target_modules": ["a"], "rank_pattern": {"q": 2, "q": 4}}"#;
    let error = serde_json::from_str::<PeftConfig>(text).unwrap_err();
    assert!(
        error.to_string().contains("the pattern `q` is given twice"),
        "{error}"
    );
}

/// `adapter_config.json` has PEFT's defaults and not ours: rank 8, alpha 8.
#[test]
fn a_minimal_adapter_config_means_rank_8_and_alpha_8() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type": "LORA", "target_modules": ["q"]}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let key = |part: &str| format!("base_model.model.q.lora_{part}.weight");
    let tensors = HashMap::from([
        (key("A"), randn(1, (8, 3), DType::F32)),
        (key("B"), randn(2, (4, 8), DType::F32)),
    ]);
    let file = dir.path().join("adapter_model.safetensors");
    candle_core::safetensors::save(&tensors, file).unwrap();
    let mut model = Paths::new(["q"]);
    model.load_adapter(dir.path()).unwrap();
    let lora = model.get("q").lora().unwrap();
    assert_eq!((lora.rank(), lora.scaling()), (8, 1.0));
}
