//! Saving and loading the folder of an adapter.

use std::fs;

use candle_core::{DType, Device, Module};
use lora_core::{Error, LoraTargets, PeftConfig, nn::Linear};
use lora_tests::{randn, to_vec};

use crate::model::{Model, WIDTH, input};

#[test]
fn a_saved_adapter_loads_and_saves_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(2, DType::F32);
    model
        .apply_lora(
            &PeftConfig::new(["q_proj", "up_proj"])
                .dim(3)
                .alpha(4.5)
                .dropout(0.1),
        )
        .unwrap();
    model.randomise();
    model.eval().unwrap();
    model.save_adapter(dir.path().join("one")).unwrap();

    let mut fresh = Model::random(2, DType::F32);
    let report = fresh.load_adapter(dir.path().join("one")).unwrap();
    assert_eq!(report, model.lora_report().unwrap());
    let xs = input(DType::F32);
    assert_eq!(
        to_vec(&fresh.forward(&xs).unwrap()),
        to_vec(&model.forward(&xs).unwrap())
    );
    fresh.save_adapter(dir.path().join("two")).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let read = |name: &str| fs::read(dir.path().join(name).join(file)).unwrap();
        assert_eq!(read("one"), read("two"), "{file}");
    }

    // Into a model that has the same adapters: the variables stay the same ones.
    let vars = fresh.lora_vars().unwrap();
    vars.iter()
        .for_each(|var| var.set(&var.zeros_like().unwrap()).unwrap());
    fresh.load_adapter(dir.path().join("one")).unwrap();
    assert_eq!(
        to_vec(&fresh.forward(&xs).unwrap()),
        to_vec(&model.forward(&xs).unwrap())
    );
    assert!(vars.iter().all(|var| to_vec(var).iter().any(|v| *v != 0.0)));
    assert_eq!(
        fs::read_dir(dir.path().join("one")).unwrap().count(),
        2,
        "no temporary file is left"
    );
}

#[test]
fn loading_names_every_missing_extra_and_misshaped_key() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(2, DType::F32);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).dim(3))
        .unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let key =
        |layer: usize, end: &str| format!("base_model.model.model.layers.{layer}.self_attn.{end}");
    tensors.remove(&key(0, "q_proj.lora_B.weight")).unwrap();
    tensors.insert(key(1, "q_proj.lora_A.weight"), randn(1, (3, 5), DType::F32));
    tensors.insert(
        key(0, "k_proj.lora_A.weight"),
        randn(1, (3, WIDTH), DType::F32),
    );
    tensors.insert("lm_head.weight".into(), randn(1, (3, 5), DType::F32));
    candle_core::safetensors::save(&tensors, &file).unwrap();

    let mut fresh = Model::random(2, DType::F32);
    let before = fresh.snapshot();
    let error = fresh.load_adapter(dir.path()).unwrap_err();
    let Error::Checkpoint { problems, .. } = &error else {
        panic!("{error}")
    };
    let all = problems.join("\n");
    for part in [
        "`base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight` is missing",
        "`model.layers.1.self_attn.q_proj.lora_A.weight` has shape [3, 5]; with rank 3 it must be [3, 12]",
        "matches `model.layers.0.self_attn.k_proj`; nearest: `model.layers.0.self_attn.",
        "`lm_head.weight` is not `base_model.model.<layer>.lora_A.weight`",
    ] {
        assert!(all.contains(part), "{all}\nlacks\n{part}");
    }
    assert_eq!(fresh.snapshot(), before);
}

#[test]
fn an_adapter_of_other_layers_is_refused_by_an_adapted_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).dim(3))
        .unwrap();
    model.save_adapter(dir.path()).unwrap();
    let load_into = |config: PeftConfig| {
        let mut other = Model::random(1, DType::F32);
        other.apply_lora(&config).unwrap();
        other.load_adapter(dir.path()).unwrap_err().to_string()
    };
    let error = load_into(PeftConfig::new(["v_proj"]).dim(3));
    assert!(
        error.contains("self_attn.v_proj.lora_A.weight` is missing"),
        "{error}"
    );
    assert!(
        error.contains("`model.layers.0.self_attn.q_proj` carries no adapter"),
        "{error}"
    );
    let error = load_into(PeftConfig::new(["q_proj"]).dim(4));
    assert!(error.contains("has rank 3"), "{error}");
    let error = load_into(PeftConfig::new(["q_proj"]).dim(3).alpha(5.0));
    assert!(error.contains("scaling"), "{error}");
}

#[test]
fn settings_that_would_be_lost_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_config.json");
    let saved: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for (key, value) in [
        ("use_dora", serde_json::json!(true)),
        ("fan_in_fan_out", serde_json::json!(true)),
        ("init_lora_weights", serde_json::json!("pissa")),
        ("peft_type", serde_json::json!("LOHA")),
        ("something_of_tomorrow", serde_json::json!({"on": 1})),
    ] {
        let mut config = saved.clone();
        config[key] = value;
        fs::write(&file, config.to_string()).unwrap();
        let error = Model::random(1, DType::F32)
            .load_adapter(dir.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(key) && error.contains("adapter_config.json"),
            "{error}"
        );
    }
    let mut config = saved.clone();
    config["something_of_tomorrow"] = serde_json::json!(null);
    config["use_rslora"] = serde_json::json!(true);
    fs::write(&file, config.to_string()).unwrap();
    let report = Model::random(1, DType::F32)
        .load_adapter(dir.path())
        .unwrap();
    assert_eq!(report.sites[0].scaling, 32.0 / 8f64.sqrt());
}

#[test]
fn files_that_are_not_there_or_broken_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    let error = model.load_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds no adapter"), "{error}");
    let error = model.save_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no adapter to save"), "{error}");
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let error = Model::random(1, DType::F32)
        .load_adapter(dir.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(model.save_adapter(dir.path().join("file/folder")).is_err());
}

#[test]
fn a_layer_whose_path_ends_like_an_adapted_one_is_excluded() {
    #[derive(LoraTargets)]
    struct Inner {
        q: Linear,
    }
    #[derive(LoraTargets)]
    struct Outer {
        a: Inner,
        x: Middle,
    }
    #[derive(LoraTargets)]
    struct Middle {
        a: Inner,
    }
    let inner = || Inner {
        q: Linear::new(randn(1, (3, 3), DType::F32), None),
    };
    let model = || Outer {
        a: inner(),
        x: Middle { a: inner() },
    };
    let dir = tempfile::tempdir().unwrap();
    let mut adapted = model();
    adapted.apply_lora(&PeftConfig::new(["a.q"])).unwrap();
    adapted.save_adapter(dir.path()).unwrap();
    let text = fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["a.q"]));
    assert_eq!(config["exclude_modules"], serde_json::json!(["x.a.q"]));
    let report = model().load_adapter(dir.path()).unwrap();
    assert_eq!(report.sites.len(), 1);
}
