//! The form that every reader takes alike.

use std::fs;

use candle_core::{DType, Tensor};
use lora_core::{
    BiasMode,
    adapter::{AdapterWeights, Consumer, Profile},
};
use lora_tests::{randn, to_vec};
use serde_json::{Value, json};

use crate::support::*;

/// Layers of other ranks, alphas and rules.
fn mixed() -> AdapterWeights {
    let mut rslora = layer(4, 6.0, 3);
    rslora.rslora = true;
    let mut adapter = adapter([
        ("model.layers.0.self_attn.q_proj", layer(2, 3.0, 1)),
        ("model.layers.0.self_attn.v_proj", layer(3, 0.7, 2)),
        ("model.layers.1.self_attn.q_proj", rslora),
        ("model.layers.1.mlp.up_proj", layer(4, -2.0, 4)),
    ]);
    adapter.dropout = 0.05;
    adapter.origin.base_model = Some("org/base".into());
    adapter.origin.task_type = Some("CAUSAL_LM".into());
    adapter
}

#[test]
fn mixed_ranks_alphas_and_rslora_act_alike_in_one_rank_and_alpha() {
    let adapter = mixed();
    let universal = adapter.to_universal().unwrap();
    assert_acts_alike(&adapter, &universal);
    let alpha = universal.layers["model.layers.1.mlp.up_proj"].alpha;
    assert!(alpha >= 1.0 && alpha.fract() == 0.0);
    for layer in universal.layers.values() {
        assert_eq!((layer.rank(), layer.alpha, layer.rslora), (4, alpha, false));
    }
}

#[test]
fn a_plain_adapter_stays_as_it_is() {
    assert_same(&plain().to_universal().unwrap(), &plain());
}

#[test]
fn every_consumer_reads_a_universal_folder_as_meant() {
    let (dir, adapter) = (tempfile::tempdir().unwrap(), mixed());
    adapter.write(dir.path(), Profile::Universal).unwrap();
    for consumer in Consumer::ALL {
        let used = consumer
            .read(dir.path())
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(used.len(), adapter.layers.len(), "{consumer}");
        for (path, layer) in &adapter.layers {
            let (used, meant) = (used[path].delta().unwrap(), layer.delta().unwrap());
            assert!(
                lora_tests::relative_error(&used, &meant) < 1e-6,
                "{consumer}: {path}"
            );
        }
    }
    assert_acts_alike(&AdapterWeights::read(dir.path()).unwrap(), &adapter);
}

#[test]
fn the_configuration_has_the_fields_of_the_profile_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    mixed().write(dir.path(), Profile::Universal).unwrap();
    let config: Value =
        serde_json::from_slice(&fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(
        config,
        json!({
            "alpha_pattern": {}, "base_model_name_or_path": "org/base", "bias": "none",
            "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
            "layers_pattern": null, "layers_to_transform": null, "lora_alpha": config["lora_alpha"],
            "lora_dropout": 0.05, "modules_to_save": null, "peft_type": "LORA", "r": 4,
            "rank_pattern": {}, "revision": null, "target_modules": ["q_proj", "up_proj", "v_proj"],
            "task_type": "CAUSAL_LM", "use_dora": false, "use_rslora": false,
        })
    );
    assert!(config["lora_alpha"].is_u64());
}

#[test]
fn half_precision_stays_where_nothing_is_rounded_and_grows_where_it_is() {
    let mut adapter = mixed();
    for layer in adapter.layers.values_mut() {
        layer.a = layer.a.to_dtype(DType::BF16).unwrap();
        layer.b = layer.b.to_dtype(DType::BF16).unwrap();
    }
    let universal = adapter.to_universal().unwrap();
    assert_acts_alike(&adapter, &universal);
    let dtypes: Vec<_> = universal
        .layers
        .values()
        .map(|layer| layer.a.dtype())
        .collect();
    assert!(dtypes.contains(&DType::F32), "{dtypes:?}");
    assert!(
        universal
            .layers
            .values()
            .all(|layer| layer.a.dtype() == layer.b.dtype())
    );

    let mut uniform = plain();
    for layer in uniform.layers.values_mut() {
        layer.a = layer.a.to_dtype(DType::F16).unwrap();
        layer.b = layer.b.to_dtype(DType::F16).unwrap();
    }
    uniform
        .layers
        .get_mut("model.layers.0.q_proj")
        .unwrap()
        .alpha = 6.0;
    let universal = uniform.to_universal().unwrap();
    assert!(
        universal
            .layers
            .values()
            .all(|layer| layer.a.dtype() == DType::F16)
    );
    assert_acts_alike(&uniform, &universal);
}

#[test]
fn what_only_peft_can_hold_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |change: &dyn Fn(&mut AdapterWeights), part: &str| {
        let mut adapter = plain();
        change(&mut adapter);
        let error = adapter
            .write(dir.path(), Profile::Universal)
            .unwrap_err()
            .to_string();
        assert_says(&error, &["universal", part]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    };
    refused(
        &|adapter| {
            let layer = adapter.layers.get_mut("model.layers.0.q_proj").unwrap();
            layer.bias = Some(randn(1, 4, DType::F32));
        },
        "`model.layers.0.q_proj` has a bias (lora_bias)",
    );
    refused(
        &|adapter| adapter.modules_to_save = vec!["head".into()],
        "modules_to_save",
    );
    refused(&|adapter| adapter.bias = BiasMode::All, "biases");
    refused(
        &|adapter| {
            adapter.saved.insert(
                "head.weight".into(),
                Tensor::new(1f32, &candle_core::Device::Cpu).unwrap(),
            );
        },
        "head.weight",
    );
}

#[test]
fn an_adapter_of_one_rank_and_a_whole_alpha_keeps_its_numbers() {
    // 29 / 7 * 7 is not 29.
    let mut layer = layer(7, 29.0, 1);
    layer.a = layer.a.to_dtype(DType::BF16).unwrap();
    layer.b = layer.b.to_dtype(DType::BF16).unwrap();
    let universal = adapter([("q_proj", layer.clone())]).to_universal().unwrap();
    let same = &universal.layers["q_proj"];
    assert_eq!((same.alpha, same.b.dtype()), (29.0, DType::BF16));
    assert_eq!(to_vec(&same.b), to_vec(&layer.b));
}
