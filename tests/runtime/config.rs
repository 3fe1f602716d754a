//! `PeftConfig`: its defaults, its dictionary, what it refuses.

use candle_core::DType;
use lora_core::{DropoutPosition, LinearLoRA, LoraInit, PeftConfig};
use lora_tests::{randn, to_vec};
use serde_json::{Map, Value, json};

fn dict(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn defaults_are_those_of_the_table() {
    let got = PeftConfig::new(["*.q_proj"]).to_dict().unwrap();
    let want = json!({
        "target_modules": ["*.q_proj"],
        "exclude_modules": [],
        "match_all_linear": false,
        "dim": 8,
        "alpha": 32,
        "dropout": 0.0,
        "dropout_position": "post",
        "lora_A_init": "xavier",
        "lora_dtype": null,
        "use_fused": true,
        "seed": 0,
    });
    assert_eq!(Value::Object(got), want);
    let empty = PeftConfig::from_dict(&dict(json!({"target_modules": ["*.q_proj"]})));
    assert_eq!(empty.unwrap(), PeftConfig::new(["*.q_proj"]));
}

#[test]
fn a_round_trip_is_exact() {
    let configs = [
        PeftConfig::new(["*.q_proj", "re:.*[kv]_proj"])
            .exclude(["*.0.*"])
            .dim(7)
            .alpha(0.1),
        PeftConfig::all_linear()
            .dropout(0.123_456_789)
            .dropout_position(DropoutPosition::Pre),
        PeftConfig::new(["a"])
            .lora_a_init(LoraInit::Gaussian)
            .lora_dtype(DType::BF16),
        PeftConfig::new(["a"])
            .lora_a_init(LoraInit::Kaiming)
            .use_fused(false)
            .seed(u64::MAX),
    ];
    for config in configs {
        assert_eq!(
            PeftConfig::from_dict(&config.to_dict().unwrap()).unwrap(),
            config
        );
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<PeftConfig>(&text).unwrap(), config);
    }
}

#[test]
fn reads_what_nemo_automodel_writes() {
    let read = |fields: Value| PeftConfig::from_dict(&dict(fields));
    let config = read(json!({
        "target_modules": "*_proj",
        "exclude_modules": null,
        "match_all_linear": false,
        "dim": 16,
        "alpha": 32,
        "dropout": 0.1,
        "dropout_position": "post",
        "lora_A_init": "xavier",
        "lora_dtype": "torch.bfloat16",
        "use_triton": false,
    }))
    .unwrap();
    let want = PeftConfig::new(["*_proj"])
        .dim(16)
        .dropout(0.1)
        .lora_dtype(DType::BF16)
        .use_fused(false);
    assert_eq!(config, want);
    for (name, dtype) in [
        ("float", DType::F32),
        ("Float32", DType::F32),
        ("double", DType::F64),
        ("torch.float64", DType::F64),
        ("half", DType::F16),
        ("torch.float16", DType::F16),
        ("BF16", DType::BF16),
        ("bfloat16", DType::BF16),
    ] {
        let config = read(json!({"target_modules": ["a"], "lora_dtype": name})).unwrap();
        assert_eq!(config, PeftConfig::new(["a"]).lora_dtype(dtype), "{name}");
    }
}

#[test]
fn what_no_adapter_can_have_is_refused_with_the_field() {
    for (fields, message) in [
        (json!({"target_modules": ["a"], "dim": 0}), "dim"),
        (json!({"target_modules": ["a"], "dim": -1}), "-1"),
        (json!({"target_modules": ["a"], "alpha": 0}), "alpha"),
        (json!({"target_modules": ["a"], "dropout": 1.0}), "dropout"),
        (json!({"target_modules": ["a"], "dropout": -0.1}), "dropout"),
        (
            json!({"target_modules": ["a"], "dropout_position": "mid"}),
            "unknown variant `mid`, expected `pre` or `post`",
        ),
        (
            json!({"target_modules": ["a"], "lora_A_init": "xavir"}),
            "unknown initialisation `xavir`; known are xavier",
        ),
        (
            json!({"target_modules": ["a"], "lora_dtype": "int8"}),
            "lora_dtype: `int8`",
        ),
        (
            json!({"target_modules": ["a"], "lora_dtype": "fp16"}),
            "lora_dtype: `fp16`",
        ),
        (
            json!({"target_modules": ["a"], "use_dora": true}),
            "unknown field `use_dora`",
        ),
        (json!({"target_modules": [1]}), "expected a list of strings"),
        (
            json!({"target_modules": ["a"], "match_all_linear": true}),
            "match_all_linear",
        ),
        (json!({}), "target_modules: names nothing"),
    ] {
        let error = PeftConfig::from_dict(&dict(fields))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("PeftConfig.") && error.contains(message),
            "{error}\nlacks {message}"
        );
    }
    assert!(serde_json::to_string(&PeftConfig::new(["a"]).dim(0)).is_err());
}

/// The first numbers of `A [rank, in]` under a rule.
fn drawn(init: LoraInit, rank: usize, inputs: usize) -> Vec<f64> {
    let config = PeftConfig::all_linear()
        .dim(rank)
        .lora_a_init(init)
        .seed(5)
        .adapter()
        .unwrap();
    let weight = randn(1, (4, inputs), DType::F32);
    to_vec(
        LinearLoRA::new("layers.0.proj", weight, None, &config)
            .unwrap()
            .lora_a(),
    )
}

#[test]
fn initial_values_follow_their_distribution() {
    let (rank, inputs) = (16, 4096);
    let deviation = |values: &[f64]| {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        assert!(mean.abs() < 4.0 * (values.iter().map(|v| v * v).sum::<f64>() / n / n).sqrt());
        (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt()
    };
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.02, "{got} {want}");
    close(
        deviation(&drawn(LoraInit::Xavier, rank, inputs)),
        (2.0 / (inputs + rank) as f64).sqrt(),
    );
    close(
        deviation(&drawn(LoraInit::Gaussian, rank, inputs)),
        1.0 / rank as f64,
    );
    let kaiming = drawn(LoraInit::Kaiming, rank, inputs);
    let bound = 1.0 / (inputs as f64).sqrt();
    close(deviation(&kaiming), bound / 3f64.sqrt());
    let largest = kaiming.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
    assert!(largest <= bound && largest > 0.999 * bound);
    // Normal, not merely of the right spread: the share within one deviation.
    let xavier = drawn(LoraInit::Xavier, rank, inputs);
    let std = (2.0 / (inputs + rank) as f64).sqrt();
    let within = xavier.iter().filter(|v| v.abs() < std).count() as f64 / xavier.len() as f64;
    assert!((within - 0.6827).abs() < 0.01, "{within}");
}
