//! The annotated BERT is transformers' BERT.

use candle_core::{DType, Device, Tensor};
use lora_core::{LoraTargets, PeftConfig};
use lora_examples::bert::{Bert, BertForSequenceClassification, BertModel};

use crate::support::{Case, golden, open};

#[test]
fn base_models_compute_what_transformers_does() {
    for case in Case::all() {
        let model = open(&case.base);
        case.assert_close("base_output", &case.forward(&model), 1e-5);
    }
}

#[test]
fn layers_have_hugging_faces_names() {
    let layer = "encoder.layer.*.";
    let names = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ];
    let mut encoder: Vec<_> = names.map(|name| format!("{layer}{name}")).into();
    encoder.push("pooler.dense".into());
    assert_eq!(BertModel::TARGETS.paths(), encoder);
    let mut classifier: Vec<_> = encoder.iter().map(|path| format!("bert.{path}")).collect();
    classifier.push("classifier".into());
    assert_eq!(BertForSequenceClassification::TARGETS.paths(), classifier);
}

#[test]
fn an_encoder_is_found_with_and_without_the_prefix() {
    let folder = |name: &str| golden("settings").join(name);
    let weights =
        candle_core::safetensors::load(folder("encoder").join("model.safetensors"), &Device::Cpu)
            .unwrap();
    let prefixed = weights
        .into_iter()
        .map(|(name, tensor)| (format!("bert.{name}"), tensor))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(&prefixed, dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(
        folder("encoder").join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();

    let ids = Tensor::new(&[[3u32, 9, 20], [7, 7, 1]], &Device::Cpu).unwrap();
    let outputs = [folder("encoder"), dir.path().into()].map(|folder| {
        let mut model = Bert::open(&folder, DType::F32, &Device::Cpu).unwrap();
        // The layers keep their paths, so the check of names against the builder passes.
        let config = PeftConfig::new(["encoder.layer.0.attention.self.query"]);
        assert_eq!(model.apply_lora(&config).unwrap().sites.len(), 1);
        let ys = model.forward(&ids, None).unwrap();
        ys.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn padding_is_not_seen() {
    let model = open("encoder");
    let forward = |ids: &[[u32; 4]; 1], mask: &[[u32; 4]; 1]| {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        let mask = Tensor::new(mask, &Device::Cpu).unwrap();
        let ys = model.forward(&ids, Some(&mask)).unwrap();
        ys.narrow(1, 0, 3).unwrap().to_vec3::<f32>().unwrap()
    };
    let mask = [[1, 1, 1, 0]];
    assert_eq!(
        forward(&[[3, 4, 5, 6]], &mask),
        forward(&[[3, 4, 5, 30]], &mask)
    );
    assert_ne!(
        forward(&[[3, 4, 5, 6]], &mask),
        forward(&[[3, 4, 5, 6]], &[[1, 1, 1, 1]])
    );
}
