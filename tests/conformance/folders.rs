//! The kinds of adapter folder that are about: those that hold a LoRA of linear layers are read,
//! the others are refused in words that say why.

use candle_core::Tensor;
use lora_core::{LoraTargets, adapter::AdapterWeights};
use lora_tests::{relative_error, to_vec};

use crate::support::{folders, golden, json, open, tensors};

/// Both hold the same matrices, and they act the same.
fn assert_same(kind: &str, got: &AdapterWeights, want: &AdapterWeights, bound: f64) {
    let paths = |adapter: &AdapterWeights| adapter.layers.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(got), paths(want), "{kind}");
    for (path, got) in &got.layers {
        let want = &want.layers[path];
        assert_eq!(got.scaling(), want.scaling(), "{kind}: {path}");
        for (got, want) in [(&got.a, &want.a), (&got.b, &want.b)] {
            assert!(relative_error(got, want) <= bound, "{kind}: {path}");
        }
    }
    assert_eq!(got.saved.len(), want.saved.len(), "{kind}");
}

#[test]
fn every_form_of_a_folder_reads_to_the_same_adapter() {
    let same_as = json("folders/kinds.json")["same_as"].clone();
    let same_as = same_as.as_object().unwrap();
    assert_eq!(same_as.len(), 6);
    for (kind, plain) in same_as {
        let folder = golden("folders/read").join(kind);
        // A named adapter is a folder in the folder.
        let folder = match kind.as_str() {
            "named" => folder.join("poet"),
            _ => folder,
        };
        let got = AdapterWeights::read(&folder).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let want = AdapterWeights::read(golden(plain.as_str().unwrap())).unwrap();
        let bound = if kind == "half" { 4e-3 } else { 0.0 };
        assert_same(kind, &got, &want, bound);
        open("untied").load_adapter(&folder).unwrap();
    }
}

#[test]
fn adapters_of_older_releases_read_to_the_same_adapter() {
    let want = AdapterWeights::read(golden("llama/untied/qv")).unwrap();
    for version in ["0.2.0", "0.5.0", "0.10.0"] {
        let got = AdapterWeights::read(golden("old").join(version));
        let got = got.unwrap_or_else(|error| panic!("{version}: {error}"));
        assert_same(version, &got, &want, 0.0);
    }
}

#[test]
fn the_least_configuration_takes_pefts_defaults() {
    let adapter = AdapterWeights::read(golden("folders/read/minimal")).unwrap();
    assert_eq!(adapter.layers.len(), 2);
    for layer in adapter.layers.values() {
        assert_eq!((layer.rank(), layer.alpha, layer.rslora), (8, 8.0, false));
    }
}

/// PEFT's default for an adapted output head: its frozen weight is in the file too.
#[test]
fn a_saved_base_weight_of_an_adapted_head_is_no_adapter() {
    let mut model = open("untied");
    let report = model
        .load_adapter(golden("folders/read/head_base_saved"))
        .unwrap();
    let sites: Vec<_> = report.sites.iter().map(|site| &site.path[..]).collect();
    assert_eq!(sites, ["lm_head"]);
    let key = "base_model.model.lm_head.base_layer.weight";
    assert!(report.notes.iter().any(|note| note.contains(key)));

    // The model's head must be the one that the adapter was made for.
    let dir = tempfile::tempdir().unwrap();
    let folder = golden("folders/read/head_base_saved");
    let mut tensors = tensors("folders/read/head_base_saved/adapter_model.safetensors");
    let other = (&tensors[key] + 1.0).unwrap();
    tensors.insert(key.into(), other);
    let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"];
    std::fs::copy(folder.join(config), dir.path().join(config)).unwrap();
    candle_core::safetensors::save(&tensors, dir.path().join(weights)).unwrap();
    let error = open("untied").load_adapter(dir.path()).unwrap_err();
    assert!(error.to_string().contains("another base"), "{error}");
    let adapter = AdapterWeights::read(dir.path()).unwrap();
    open("untied").import_adapter("default", &adapter).unwrap();
}

/// PEFT writes them beside the module's own, which are what counts.
#[test]
fn biases_inside_a_saved_module_are_read_once() {
    let folder = golden("settings/classifier/head_bias_all");
    let adapter = AdapterWeights::read(&folder).unwrap();
    let inner = |key: &&String| key.contains("module");
    assert_eq!(adapter.saved.keys().find(inner), None);
    for (note, count) in [("is a copy of", 2), ("that the adapter replaces", 2)] {
        let notes = adapter.notes.iter().filter(|text| text.contains(note));
        assert_eq!(notes.count(), count, "{note}");
    }
}

#[test]
fn a_nemo_folder_keeps_its_dropout_behind_the_adapter() {
    let adapter = AdapterWeights::read(golden("folders/read/nemo")).unwrap();
    assert_eq!(adapter.dropout, 0.05);
    assert_eq!(adapter.dropout_position, lora_core::DropoutPosition::Post);
}

#[test]
fn what_is_no_lora_of_linear_layers_is_refused_by_name() {
    let refused = json("folders/kinds.json")["refused"].clone();
    let refused = refused.as_object().unwrap();
    assert_eq!(
        refused.keys().cloned().collect::<Vec<_>>(),
        folders("folders/refused")
    );
    for (kind, word) in refused {
        let folder = golden("folders/refused").join(kind);
        let mut model = open("untied");
        let ids = Tensor::new(&[[3u32, 4]], &candle_core::Device::Cpu).unwrap();
        let before = to_vec(&model.forward(&ids, None).unwrap());
        let error = model.load_adapter(&folder).expect_err(kind).to_string();
        assert!(error.contains(word.as_str().unwrap()), "{kind}: {error}");
        assert_eq!(
            to_vec(&model.forward(&ids, None).unwrap()),
            before,
            "{kind}"
        );
    }
}
