//! Which layers PEFT adapts, and ours: `tests/golden/matching.json`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use lora_core::{LoraTargets, PeftConfig, nn::Linear};
use serde_json::{Map, Value, json};

use crate::model::{Paths, linear, ranks_and_alphas, read};

/// The cases where ours is not PEFT's answer, by the settings, and the error it is instead.
const STRICTER: &[(&str, &str)] = &[
    // PEFT knows the targets of some architectures.
    (
        r#"{"target_modules":null}"#,
        "PeftConfig.target_modules: names nothing",
    ),
    (
        r#"{"target_modules":["q_proj","no_such_proj"]}"#,
        "matches `no_such_proj`",
    ),
    (
        r#"{"exclude_modules":["no_such_proj"],"target_modules":["q_proj"]}"#,
        "matches `no_such_proj`",
    ),
    (
        r#"{"exclude_modules":"layers\\.1","target_modules":["q_proj"]}"#,
        "matches `re:layers\\.1`",
    ),
    (
        r#"{"exclude_modules":["layers.1"],"target_modules":["q_proj"]}"#,
        "matches `layers.1`",
    ),
    (
        r#"{"target_modules":["all-linear","q_proj"]}"#,
        "matches `all-linear`",
    ),
    (
        r#"{"layers_pattern":["h","layers"],"layers_to_transform":[1],"target_modules":["q_proj"]}"#,
        "`h` is the name of no list of layers; nearest: `model.layers`",
    ),
    (
        r#"{"rank_pattern":{".*q":2,"layers.1.q":4},"target_modules":["q","q_proj"]}"#,
        "`.*q` gives `layers.1.q` 2 and `layers.1.q` gives it 4",
    ),
    (
        r#"{"alpha_pattern":{"nothing":3},"rank_pattern":{"nothing":2},"target_modules":["q"]}"#,
        "`nothing` matches no adapted layer",
    ),
];

/// The cases where ours reaches other layers than PEFT: layers at the root have an index here.
const ROOT_LAYERS: &str = r#"{"layers_to_transform":[1],"target_modules":["q"]}"#;

#[test]
fn the_same_layers_are_adapted_as_by_peft_or_it_is_an_error() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/matching.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 66, "{}", cases.len());
    let mut stricter = 0;
    for case in cases {
        let (model, fields, answer) = parts(case);
        let paths: Vec<&str> = golden["models"][model]
            .as_array()
            .unwrap()
            .iter()
            .map(|path| path.as_str().unwrap())
            .collect();
        let settings = serde_json::to_string(&fields).unwrap();
        let got = ours(model, &paths, &fields);
        if let Some((_, message)) = STRICTER.iter().find(|(known, _)| *known == settings) {
            let error = got.unwrap_err();
            assert!(error.contains(message), "{settings}: {error}");
            stricter += 1;
        } else if settings == ROOT_LAYERS && model == "root" {
            let got: Vec<_> = got.unwrap().into_keys().collect();
            assert_eq!(got, ["layers.1.q", "q"]);
        } else if let Some(want) = answer {
            assert_eq!(got.unwrap(), want, "{model} {settings}");
        } else {
            assert!(got.is_err(), "{model} {settings}: {got:?}");
        }
    }
    assert!(stricter >= STRICTER.len(), "{stricter}");
}

type Adapted = BTreeMap<String, (usize, f64)>;

/// The model, the settings and PEFT's answer, if it has one.
fn parts(case: &Value) -> (&str, Map<String, Value>, Option<Adapted>) {
    let mut fields = case.as_object().unwrap().clone();
    let adapted = fields.remove("adapted").map(|adapted| {
        let pair = |pair: &Value| {
            (
                pair[0].as_u64().unwrap() as usize,
                pair[1].as_f64().unwrap(),
            )
        };
        let adapted = adapted.as_object().unwrap().iter();
        adapted.map(|(path, it)| (path.clone(), pair(it))).collect()
    });
    fields.remove("error");
    fields.remove("model");
    (case["model"].as_str().unwrap(), fields, adapted)
}

/// What ours makes of PEFT's settings.
fn ours(model: &str, paths: &[&str], fields: &Map<String, Value>) -> Result<Adapted, String> {
    let mut ours = fields.clone();
    ours.insert("dim".into(), json!(8));
    ours.insert("alpha".into(), json!(16));
    for field in ["target_modules", "exclude_modules"] {
        if let Some(value) = ours.get_mut(field) {
            *value = translated(value, paths);
        }
    }
    let plan = |config: &PeftConfig| {
        if model.starts_with("transformers_") {
            Headed::new(paths).lora_plan(config)
        } else {
            Paths::new(paths.iter().copied()).lora_plan(config)
        }
    };
    let plan = read(Value::Object(ours)).and_then(|config| plan(&config));
    plan.map(|plan| ranks_and_alphas(&plan))
        .map_err(|error| error.to_string())
}

/// PEFT's way to name layers in ours: a string is a regular expression, the entries of a list are
/// ends of paths from a dot, and stars in them are no wildcards.
fn translated(value: &Value, paths: &[&str]) -> Value {
    match value {
        Value::String(text) if text.eq_ignore_ascii_case("all-linear") => value.clone(),
        Value::String(text) => json!(format!("re:{text}")),
        Value::Array(entries) => {
            let entries = entries.iter().map(|entry| entry.as_str().unwrap());
            json!(
                entries
                    .flat_map(|entry| ends(entry, paths))
                    .collect::<Vec<_>>()
            )
        }
        other => other.clone(),
    }
}

/// Patterns for the end of a path from a dot.
fn ends(entry: &str, paths: &[&str]) -> Vec<String> {
    if entry.contains('*') {
        return vec![format!(r"re:(.*\.)?{}", regex::escape(entry))];
    }
    if !entry.contains('.') {
        return vec![entry.to_string()];
    }
    let whole = paths.contains(&entry).then(|| entry.to_string());
    let end = format!(".{entry}");
    let inner = paths.iter().any(|path| path.ends_with(&end));
    let inner = inner.then(|| format!("*{end}"));
    let patterns: Vec<_> = whole.into_iter().chain(inner).collect();
    if patterns.is_empty() {
        vec![entry.to_string()]
    } else {
        patterns
    }
}

/// A model of these paths, of which the last is the output head.
#[derive(LoraTargets)]
struct Headed {
    #[lora(flatten)]
    body: Paths,
    #[lora(head)]
    lm_head: Linear,
}

impl Headed {
    fn new(paths: &[&str]) -> Self {
        let body = paths.iter().copied().filter(|path| *path != "lm_head");
        Self {
            body: Paths::new(body),
            lm_head: linear(1, 4, 3),
        }
    }
}
