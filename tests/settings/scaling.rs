//! What an adapter's output is multiplied by.

use candle_core::{DType, Device, Module, Tensor};
use lora_core::{LinearLoRA, LoraTargets, PeftConfig};
use lora_tests::{randn, relative_error, to_vec};

use crate::model::Paths;

#[test]
fn plain_is_alpha_over_rank_and_rslora_alpha_over_its_root() {
    let config = PeftConfig::new(["q"]).dim(16).alpha(24.0);
    assert_eq!(config.scaling(), 1.5);
    assert_eq!(config.adapter().unwrap().scaling(), 1.5);
    let config = config.use_rslora(true);
    assert_eq!(config.scaling(), 6.0);
    assert_eq!(config.adapter().unwrap().scaling(), 6.0);
}

#[test]
fn every_layer_is_scaled_by_its_own_rank_and_alpha() {
    let mut model = Paths::new(["0.q", "1.q", "2.q"]);
    let config = PeftConfig::new(["q"])
        .dim(4)
        .alpha(6.0)
        .rank_pattern([("1.q", 9)])
        .alpha_pattern([("2.q", 1.0), ("1.q", 3.0)]);
    for (rslora, want) in [(false, [1.5, 1.0 / 3.0, 0.25]), (true, [3.0, 1.0, 0.5])] {
        let config = config.clone().use_rslora(rslora);
        let plan = model.lora_plan(&config).unwrap();
        let planned: Vec<_> = plan.adapted.iter().map(|adapter| adapter.scaling).collect();
        assert_eq!(planned, want);
        model.apply_lora(&config).unwrap();
        let mut applied = Vec::new();
        model
            .for_each_adapter(&mut |lora| {
                applied.push(lora.scaling());
                Ok(())
            })
            .unwrap();
        assert_eq!(applied, want);
        model.remove_adapters().unwrap();
    }
}

#[test]
fn the_forward_pass_scales_by_it() {
    let config = PeftConfig::new(["q"]).dim(4).alpha(6.0).use_rslora(true);
    let weight = randn(1, (5, 3), DType::F32);
    let layer = LinearLoRA::new("q", weight.clone(), None, &config.adapter().unwrap()).unwrap();
    layer.lora_b().set(&randn(2, (5, 4), DType::F32)).unwrap();
    let delta = layer.lora_b().matmul(layer.lora_a()).unwrap();
    let xs = randn(3, (7, 3), DType::F32);
    let want = (weight + (delta * 3.0).unwrap()).unwrap();
    let want = xs.matmul(&want.t().unwrap()).unwrap();
    assert!(relative_error(&layer.forward(&xs).unwrap(), &want) < 1e-6);
}

#[test]
fn rslora_equals_pefts() {
    for name in ["f32_rslora", "f64_rslora"] {
        let file = format!(
            "{}/golden/linear/{name}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let number = |name: &str| to_vec(&tensors[name])[0];
        let config = PeftConfig::new(["q"])
            .dim(tensors["A"].dims()[0])
            .alpha(number("alpha"))
            .use_rslora(true)
            .lora_dtype(tensors["A"].dtype());
        let (weight, bias) = (tensors["W"].clone(), tensors.get("b").cloned());
        let layer = LinearLoRA::new("q", weight, bias, &config.adapter().unwrap()).unwrap();
        layer.lora_a().set(&tensors["A"]).unwrap();
        layer.lora_b().set(&tensors["B"]).unwrap();
        assert!((layer.scaling() / number("scaling") - 1.0).abs() < 1e-15);
        let ys: Tensor = layer.forward(&tensors["x"]).unwrap();
        assert!(relative_error(&ys, &tensors["y"]) < 1e-6, "{name}");
    }
}

#[test]
fn an_rslora_adapter_is_scaled_alike_after_saving_and_loading() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Paths::new(["0.q", "1.q"]);
    let config = PeftConfig::new(["q"])
        .dim(4)
        .alpha(6.0)
        .rank_pattern([("1.q", 9)])
        .use_rslora(true);
    model.apply_lora(&config).unwrap();
    model.save_adapter(dir.path()).unwrap();
    let mut other = Paths::new(["0.q", "1.q"]);
    other.load_adapter(dir.path()).unwrap();
    let scaling = |path: &str| other.get(path).lora().unwrap().scaling();
    assert!((scaling("0.q") - 3.0).abs() < 1e-12 && (scaling("1.q") - 2.0).abs() < 1e-12);
}
