//! PEFT's arguments, taken over into a configuration of ours: the same sites, ranks, alphas and
//! scalings, and the same other tensors to train.

use lora_core::{LoraTargets, PeftConfig};
use serde_json::{Map, Value, json};

use crate::support::{Case, open};

/// PEFT's arguments in our words. A string is a regular expression here only after `re:`, and an
/// entry of several segments is the end of a path only after `*.`.
fn config(case: &Case) -> Map<String, Value> {
    let given = case.case["given"].as_object().unwrap();
    let mut paths = Vec::new();
    let visited = open(&case.base).for_each_linear(&mut |path, _| {
        paths.push(path.to_string());
        Ok(())
    });
    visited.unwrap();
    let name = |name: &Value| {
        let name = name.as_str().unwrap();
        match name.contains('.') && !paths.iter().any(|path| path == name) {
            true => json!(format!("*.{name}")),
            false => json!(name),
        }
    };
    let mut config = Map::new();
    for (key, value) in given {
        let value = match (key.as_str(), value) {
            ("target_modules", Value::String(all)) if all == "all-linear" => value.clone(),
            ("target_modules" | "exclude_modules", Value::String(expression)) => {
                json!(format!("re:{expression}"))
            }
            ("target_modules" | "exclude_modules", Value::Array(names)) => {
                names.iter().map(name).collect()
            }
            _ => value.clone(),
        };
        let key = match key.as_str() {
            "task_type" => continue,
            "r" => "dim",
            "lora_alpha" => "alpha",
            key => key,
        };
        config.insert(key.to_string(), value);
    }
    if !given.contains_key("target_modules") {
        config.insert("target_modules".into(), json!(["query", "value"])); // PEFT's for a BERT
    }
    if given.get("task_type") == Some(&json!("SEQ_CLS")) {
        // PEFT adds it for this task.
        let saved = config.entry("modules_to_save").or_insert(json!([]));
        saved.as_array_mut().unwrap().push(json!("classifier"));
    }
    config
}

#[test]
fn plans_adapt_and_train_what_peft_does() {
    for case in Case::all() {
        match case.name.as_str() {
            // Two keys that disagree about a layer: which one holds depends on their order.
            "settings/encoder/patterns" => continue,
            // PEFT takes `norm` for the end of `input_layernorm`.
            "settings/untied/norms_saved" => continue,
            _ => {}
        }
        let config = PeftConfig::from_dict(&config(&case)).unwrap();
        let plan = open(&case.base).lora_plan(&config);
        let plan = plan.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let mut sites = Map::new();
        for site in &plan.adapted {
            // PEFT's are the numbers that it was given.
            let alpha = case.case["sites"][&site.path][1].clone();
            assert_eq!(
                alpha.as_f64(),
                Some(site.alpha),
                "{}: {}",
                case.name,
                site.path
            );
            sites.insert(site.path.clone(), json!([site.rank, alpha, site.scaling]));
        }
        assert_eq!(Value::Object(sites), case.case["sites"], "{}", case.name);
        let trained = plan.trained.iter();
        let mut trained: Vec<_> = trained
            .map(|tensor| format!("{}.{}", tensor.path, tensor.name))
            .collect();
        trained.sort();
        assert_eq!(json!(trained), case.case["saved"], "{}", case.name);
    }
}

#[test]
fn patterns_whose_order_would_count_are_an_error() {
    let cases = Case::all();
    let case = cases
        .iter()
        .find(|case| case.name == "settings/encoder/patterns");
    let config = PeftConfig::from_dict(&config(case.unwrap())).unwrap();
    let error = open("encoder").lora_plan(&config).unwrap_err().to_string();
    assert!(error.contains("rank_pattern"), "{error}");
    assert!(
        error.contains("encoder.layer.0.attention.self.query"),
        "{error}"
    );
}

/// The name of a module, not the end of its letters: `input_layernorm` is another one.
#[test]
fn modules_to_save_are_whole_names() {
    let config = PeftConfig::new(["q_proj"]).modules_to_save(["norm"]);
    let plan = open("untied").lora_plan(&config).unwrap();
    let trained: Vec<_> = plan.trained.iter().map(|tensor| &tensor.path[..]).collect();
    assert_eq!(trained, ["model.norm"]);
}
