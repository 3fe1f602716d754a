//! Folders as PEFT and NeMo AutoModel keep them.

use std::{fs, path::PathBuf};

use candle_core::DType;
use lora_core::{
    BiasMode, DropoutPosition, Error,
    adapter::{AdapterWeights, Profile},
};
use lora_tests::{randn, to_vec};
use serde_json::{Value, json};

use crate::support::*;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("files/fixtures")
        .join(name)
}

#[test]
fn a_torch_file_holds_what_the_safetensors_file_of_the_same_adapter_holds() {
    for name in ["plain", "half", "everything"] {
        let pickle = AdapterWeights::read(fixture(&format!("{name}_bin"))).unwrap();
        let safe = AdapterWeights::read(fixture(&format!("{name}_safetensors"))).unwrap();
        assert_same(&pickle, &safe);
        assert_eq!(pickle.notes, safe.notes);
        let dtype = if name == "half" {
            DType::BF16
        } else {
            DType::F32
        };
        assert!(pickle.layers.values().all(|layer| layer.a.dtype() == dtype));
    }
}

#[test]
fn views_of_one_storage_are_read_where_they_lie() {
    let adapter = AdapterWeights::read(fixture("views_bin")).unwrap();
    let layer = &adapter.layers["q_proj"];
    let odd_and_even: Vec<f64> = (0..6)
        .map(|i| f64::from(2 * i + 1))
        .chain((0..6).map(|i| f64::from(2 * i + 2)))
        .collect();
    assert_eq!(to_vec(&layer.a), odd_and_even);
    assert_eq!(to_vec(&layer.b), (5..13).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn rslora_patterns_biases_and_saved_modules_come_with_the_file() {
    let adapter = AdapterWeights::read(fixture("everything_safetensors")).unwrap();
    let (q, v) = (&adapter.layers["q_proj"], &adapter.layers["v_proj"]);
    assert_eq!(
        (q.rank(), q.alpha, q.scaling()),
        (3, 3.0, 3.0 / 3f64.sqrt())
    );
    assert_eq!(
        (v.rank(), v.alpha, v.scaling()),
        (2, 5.0, 5.0 / 2f64.sqrt())
    );
    assert!(q.bias.is_some() && v.bias.is_some());
    assert_eq!(adapter.bias, BiasMode::LoraOnly);
    assert_eq!(adapter.modules_to_save, ["head"]);
    let saved: Vec<_> = adapter.saved.keys().map(String::as_str).collect();
    assert_eq!(saved, ["head.bias", "head.weight", "q_proj.bias"]);
    assert_eq!(adapter.dropout_position, DropoutPosition::Pre);
}

#[test]
fn what_peft_wrote_we_write_with_the_same_names_types_and_numbers() {
    for name in ["plain", "half", "everything"] {
        let folder = fixture(&format!("{name}_safetensors"));
        let adapter = AdapterWeights::read(&folder).unwrap();
        let dir = tempfile::tempdir().unwrap();
        adapter.write(dir.path(), Profile::Peft).unwrap();
        let load = |dir: &std::path::Path| {
            candle_core::safetensors::load(dir.join(WEIGHTS), &candle_core::Device::Cpu).unwrap()
        };
        let (ours, theirs) = (load(dir.path()), load(&folder));
        assert_eq!(ours.len(), theirs.len());
        for (key, tensor) in theirs {
            assert_eq!(bits(&tensor), bits(&ours[&key]), "{key}");
        }
        // Every field that we write has PEFT's value, but for names that are now exact.
        let fields = |dir: &std::path::Path| -> Value {
            serde_json::from_slice(&fs::read(dir.join(CONFIG)).unwrap()).unwrap()
        };
        let (ours, theirs) = (fields(dir.path()), fields(&folder));
        for (key, value) in ours.as_object().unwrap() {
            if !key.ends_with("_pattern") {
                assert_eq!(value, &theirs[key], "{key}");
            }
        }
        assert_same(&AdapterWeights::read(dir.path()).unwrap(), &adapter);
    }
}

#[test]
fn a_written_folder_is_read_and_written_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = plain();
    let layer = adapter.layers.get_mut("model.layers.1.v_proj").unwrap();
    layer.alpha = 0.1 + 0.2; // a number that careless JSON readers round
    layer.bias = Some(randn(9, 4, DType::F32));
    adapter
        .saved
        .insert("lm_head.weight".into(), randn(3, (5, 4), DType::BF16));
    adapter
        .saved
        .insert("model.layers.0.q_proj.bias".into(), randn(4, 4, DType::F32));
    adapter
        .saved
        .insert("model.norm.bias".into(), randn(4, 4, DType::F32));
    adapter.modules_to_save = vec!["lm_head".into()];
    adapter.bias = BiasMode::All;
    adapter.dropout = 0.1;
    adapter.origin.base_model = Some("org/base".into());
    adapter.origin.task_type = Some("CAUSAL_LM".into());
    let weight = randn(1, (4, 6), DType::F32);
    adapter.origin.fingerprint =
        Some(lora_core::adapter::Fingerprint::of([("q", &weight)]).unwrap());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    adapter.write(&one, Profile::Peft).unwrap();
    let read = AdapterWeights::read(&one).unwrap();
    read.write(&two, Profile::Peft).unwrap();
    for file in [WEIGHTS, CONFIG] {
        assert_eq!(
            fs::read(one.join(file)).unwrap(),
            fs::read(two.join(file)).unwrap(),
            "{file}"
        );
    }
    // The layer without a bias has a bias of zeros now: the setting is the whole file's.
    let filled = adapter.layers.get_mut("model.layers.0.q_proj").unwrap();
    filled.bias = Some(
        filled
            .b
            .narrow(1, 0, 1)
            .unwrap()
            .zeros_like()
            .unwrap()
            .squeeze(1)
            .unwrap(),
    );
    assert_same(&read, &adapter);
    assert_eq!(
        fs::read_dir(&one).unwrap().count(),
        2,
        "no temporary file is left"
    );
}

#[test]
fn mixed_rslora_is_written_as_alphas_of_the_same_scaling() {
    let mut adapter = plain();
    adapter
        .layers
        .get_mut("model.layers.0.q_proj")
        .unwrap()
        .rslora = true;
    let dir = tempfile::tempdir().unwrap();
    adapter.write(dir.path(), Profile::Peft).unwrap();
    let read = AdapterWeights::read(dir.path()).unwrap();
    for (path, layer) in &adapter.layers {
        let error = (read.layers[path].scaling() / layer.scaling() - 1.0).abs();
        assert!(error < 1e-15, "{path}");
    }
}

#[test]
fn a_nemo_folder_has_its_dropout_in_the_second_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "base_model_name_or_path": "org/base", "bias": "none", "lora_alpha": 32, "peft_type": "LORA",
        "r": 2, "target_modules": ["model.layers.0.q_proj"], "task_type": "CAUSAL_LM", "use_dora": false,
    });
    let tensors = [("lora_A", (2, 6)), ("lora_B", (4, 2))].map(|(name, shape)| {
        (
            format!("base_model.model.model.layers.0.q_proj.{name}.weight"),
            randn(1, shape, DType::BF16),
        )
    });
    put(dir.path(), &config, &tensors.into());
    let automodel = dir.path().join("automodel_peft_config.json");
    let fields = |extra: Value| {
        let mut fields = json!({
            "target_modules": ["*.q_proj"], "exclude_modules": [], "match_all_linear": false,
            "dropout": 0.05, "dropout_position": "post", "lora_A_init": "xavier",
            "lora_dtype": "torch.bfloat16", "use_triton": true, "use_dora": false,
            "moe_rank_scaling": false, "use_memory_efficient_lora": true,
        });
        for (key, value) in extra.as_object().unwrap() {
            fields[key] = value.clone();
        }
        fields.to_string()
    };
    fs::write(&automodel, fields(json!({}))).unwrap();
    let adapter = AdapterWeights::read(dir.path()).unwrap();
    assert_eq!(
        (adapter.dropout, adapter.dropout_position),
        (0.05, DropoutPosition::Post)
    );
    assert_eq!(adapter.layers["model.layers.0.q_proj"].scaling(), 16.0);
    assert_eq!(adapter.notes, Vec::<String>::new());
    for (key, value) in [
        ("use_dora", json!(true)),
        ("moe_rank_scaling", json!(true)),
        ("dropout_position", json!("middle")),
        ("of_tomorrow", json!(3)),
    ] {
        fs::write(&automodel, fields(json!({ key: value }))).unwrap();
        let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
        assert_says(&error, &["automodel_peft_config.json", key]);
    }
    // Written over, the foreign half of the configuration is gone.
    adapter.write(dir.path(), Profile::Peft).unwrap();
    assert!(!automodel.exists());
}

#[test]
fn named_adapters_are_read_from_sub_directories() {
    let dir = tempfile::tempdir().unwrap();
    plain()
        .write(dir.path().join("cats"), Profile::Peft)
        .unwrap();
    plain()
        .write(dir.path().join("dogs"), Profile::Peft)
        .unwrap();
    let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
    assert_says(&error, &["cats, dogs", "read_named"]);
    let named = AdapterWeights::read_named(dir.path()).unwrap();
    assert_eq!(named.keys().collect::<Vec<_>>(), ["cats", "dogs"]);
    assert_same(&named["dogs"], &plain());
    plain().write(dir.path(), Profile::Peft).unwrap();
    let named = AdapterWeights::read_named(dir.path()).unwrap();
    assert_eq!(
        named.keys().collect::<Vec<_>>(),
        ["cats", "default", "dogs"]
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(AdapterWeights::read_named(empty.path()).is_err());
}

#[test]
fn a_weights_file_is_read_with_the_configuration_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    plain().write(dir.path(), Profile::Peft).unwrap();
    fs::rename(
        dir.path().join(WEIGHTS),
        dir.path().join("step_10.safetensors"),
    )
    .unwrap();
    assert_same(
        &AdapterWeights::read(dir.path().join("step_10.safetensors")).unwrap(),
        &plain(),
    );
    let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
    assert_says(&error, &["holds no adapter", WEIGHTS]);
}

#[test]
fn files_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = AdapterWeights::read(dir.path().join("none"))
        .unwrap_err()
        .to_string();
    assert_says(&error, &["none"]);
    plain().write(dir.path(), Profile::Peft).unwrap();
    fs::remove_file(dir.path().join(CONFIG)).unwrap();
    let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
    assert_says(&error, &[CONFIG]);
    fs::create_dir(dir.path().join(CONFIG)).unwrap();
    let error = AdapterWeights::read(dir.path()).unwrap_err().to_string();
    assert_says(&error, &["no plain file"]);
}

#[test]
fn what_cant_be_written_is_named_and_leaves_the_old_files() {
    let dir = tempfile::tempdir().unwrap();
    plain().write(dir.path(), Profile::Peft).unwrap();
    let before = fs::read(dir.path().join(WEIGHTS)).unwrap();
    let refused = |change: &dyn Fn(&mut AdapterWeights), parts: &[&str]| {
        let mut adapter = plain();
        change(&mut adapter);
        let error = adapter.write(dir.path(), Profile::Peft).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
        assert_says(&error.to_string(), parts);
        assert_eq!(fs::read(dir.path().join(WEIGHTS)).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    };
    refused(&|adapter| adapter.layers.clear(), &["no layer"]);
    refused(
        &|adapter| {
            let layer = adapter.layers.get_mut("model.layers.0.q_proj").unwrap();
            layer.b = (&layer.b * f64::INFINITY).unwrap();
        },
        &["q_proj.lora_B.weight", "NaN or infinity"],
    );
    refused(
        &|adapter| {
            let layer = adapter.layers.get_mut("model.layers.0.q_proj").unwrap();
            layer.b = randn(1, (4, 3), DType::F32);
        },
        &["model.layers.0.q_proj", "[4, 3]"],
    );
    refused(
        &|adapter| {
            adapter
                .saved
                .insert("lm_head.weight".into(), randn(1, 3, DType::F32));
        },
        &["lm_head.weight", "modules_to_save"],
    );
    for path in ["a..b", "a/b", "", "x.original_module.y"] {
        refused(
            &|adapter| {
                adapter.layers.insert(path.into(), layer(2, 1.0, 1));
            },
            &[path],
        );
    }
}

#[test]
fn a_layer_whose_path_ends_like_an_adapted_one_is_excluded() {
    let mut adapter = adapter([("a.q", layer(2, 1.0, 1))]);
    adapter.excluded = vec!["x.a.q".into(), "b.k".into()];
    let dir = tempfile::tempdir().unwrap();
    adapter.write(dir.path(), Profile::Peft).unwrap();
    let config: Value =
        serde_json::from_slice(&fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(config["exclude_modules"], json!(["x.a.q"]));
    assert_eq!(
        AdapterWeights::read(dir.path()).unwrap().excluded,
        ["x.a.q"]
    );
}

#[cfg(unix)]
#[test]
fn a_link_in_the_place_of_a_file_being_written_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (outside, folder) = (dir.path().join("outside"), dir.path().join("adapter"));
    fs::write(&outside, "mine").unwrap();
    fs::create_dir(&folder).unwrap();
    let beside = folder.join(format!("{WEIGHTS}.tmp"));
    std::os::unix::fs::symlink(&outside, beside).unwrap();
    plain().write(&folder, Profile::Peft).unwrap();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    AdapterWeights::read(&folder).unwrap();
}
