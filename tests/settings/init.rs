//! How adapters begin: PEFT's rules, by the numbers that they draw.

use std::fs;

use candle_core::{DType, Module, Tensor};
use lora_core::{LinearLoRA, LoraInit, LoraTargets, PeftConfig};
use lora_tests::{randn, relative_error, to_vec};
use serde_json::Value;

use crate::model::{Paths, linear};

const INITS: [LoraInit; 5] = [
    LoraInit::Xavier,
    LoraInit::Kaiming,
    LoraInit::Gaussian,
    LoraInit::Orthogonal,
    LoraInit::RandomB,
];

fn config(init: LoraInit, rank: usize) -> PeftConfig {
    PeftConfig::all_linear()
        .dim(rank)
        .alpha(rank as f64)
        .lora_a_init(init)
        .seed(5)
}

/// A fresh adapter on a layer `[out, in]`.
fn layer(config: &PeftConfig, outputs: usize, inputs: usize) -> LinearLoRA {
    let weight = randn(1, (outputs, inputs), DType::F32);
    LinearLoRA::new("layers.0.proj", weight, None, &config.adapter().unwrap()).unwrap()
}

/// The mean, the deviation and the greatest magnitude.
fn moments(tensor: &Tensor) -> (f64, f64, f64) {
    let values = to_vec(tensor);
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let greatest = values.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
    (mean, variance.sqrt(), greatest)
}

#[test]
fn kaiming_and_gaussian_reach_as_far_as_pefts() {
    let file = format!("{}/golden/init.json", env!("CARGO_MANIFEST_DIR"));
    let golden: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let number = |key: &str| case[key].as_f64();
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let mut fields = config(LoraInit::Xavier, size("r")).to_dict().unwrap();
        fields.insert("lora_A_init".into(), case["init_lora_weights"].clone());
        let config = PeftConfig::from_dict(&fields).unwrap();
        let layer = layer(&config, size("out"), size("in"));
        let (mean, deviation, greatest) = moments(layer.lora_a());
        let want = number("std").unwrap();
        let values = (size("r") * size("in")) as f64;
        assert!(
            (deviation / want - 1.0).abs() < 3.0 / values.sqrt(),
            "{case}: {deviation}"
        );
        assert!(mean.abs() < 4.0 * want / values.sqrt(), "{case}: {mean}");
        if let Some(bound) = number("bound") {
            assert!(
                greatest <= bound && greatest > 0.98 * bound,
                "{case}: {greatest}"
            );
        }
        assert_eq!(number("b_abs_max"), Some(moments(layer.lora_b()).2));
    }
}

#[test]
fn false_draws_b_as_well_and_changes_the_output() {
    let layer = layer(&config(LoraInit::RandomB, 16), 300, 200);
    let (mean, deviation, greatest) = moments(layer.lora_b());
    let bound = 0.25; // 1 / √16
    assert!(greatest <= bound && greatest > 0.999 * bound, "{greatest}");
    assert!((deviation / (bound / 3f64.sqrt()) - 1.0).abs() < 0.02 && mean.abs() < 0.01);
    // A is drawn as by true.
    let like = self::layer(&config(LoraInit::Kaiming, 16), 300, 200);
    assert_eq!(to_vec(layer.lora_a()), to_vec(like.lora_a()));
}

#[test]
fn the_bias_of_an_adapter_begins_as_b_does() {
    for init in [LoraInit::Xavier, LoraInit::Kaiming, LoraInit::RandomB] {
        let mut model = Paths::one("q", linear(1, 300, 200));
        model.apply_lora(&config(init, 16).lora_bias(true)).unwrap();
        let vars = model.named_lora_vars().unwrap();
        let (_, bias) = vars
            .iter()
            .find(|(name, _)| name == "q.lora_B.bias")
            .unwrap();
        assert_eq!(bias.dims(), [300]);
        let (_, deviation, greatest) = moments(bias);
        if init == LoraInit::RandomB {
            let bound = 0.25; // 1 / √16
            assert!(greatest <= bound && greatest > 0.95 * bound, "{greatest}");
            assert!(
                (deviation / (bound / 3f64.sqrt()) - 1.0).abs() < 0.1,
                "{deviation}"
            );
        } else {
            assert_eq!(greatest, 0.0, "{init}");
        }
    }
}

#[test]
fn only_false_changes_the_output() {
    let xs = randn(9, (6, 40), DType::F32);
    for init in INITS {
        let layer = layer(&config(init, 8), 30, 40);
        let base = xs.matmul(&layer.weight().t().unwrap()).unwrap();
        let error = relative_error(&layer.forward(&xs).unwrap(), &base);
        if init == LoraInit::RandomB {
            assert!(error > 1e-2, "{init}: {error}");
        } else {
            assert!(error < 1e-6, "{init}: {error}");
        }
    }
}

#[test]
fn orthogonal_factors_are_not_zero_but_their_product_is() {
    for rank in [2, 8, 64] {
        let layer = layer(&config(LoraInit::Orthogonal, rank), 400, 500);
        let product = layer.lora_b().matmul(layer.lora_a()).unwrap();
        let greatest = moments(&product).2;
        assert!(greatest < 1e-6, "rank {rank}: {greatest}");
        // Half of the rank's directions hold normal numbers with deviation 1/10.
        let want = 0.1 / 2f64.sqrt();
        for factor in [layer.lora_a(), layer.lora_b()] {
            let (_, deviation, _) = moments(factor);
            assert!(
                (deviation / want - 1.0).abs() < 0.15,
                "rank {rank}: {deviation}"
            );
        }
    }
}

#[test]
fn orthogonal_needs_an_even_rank() {
    let error = config(LoraInit::Orthogonal, 7)
        .adapter()
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("PeftConfig.dim: the rank is 7"),
        "{error}"
    );
}

#[test]
fn draws_depend_on_seed_path_and_nothing_else() {
    for init in INITS {
        let config = config(init, 4);
        let draw = |config: &PeftConfig, path: &str| {
            let weight = randn(1, (5, 6), DType::F32);
            let adapter = config.adapter().unwrap();
            let layer = LinearLoRA::new(path, weight, None, &adapter).unwrap();
            [to_vec(layer.lora_a()), to_vec(layer.lora_b())]
        };
        let first = draw(&config, "a");
        assert_eq!(first, draw(&config, "a"), "{init}");
        let (path, seed) = (draw(&config, "b"), draw(&config.clone().seed(6), "a"));
        assert!(first[0] != path[0] && first[0] != seed[0], "{init}");
        let random = first[1].iter().any(|value| *value != 0.0);
        assert_eq!(random, first[1] != path[1], "{init}");
    }
}

/// PEFT rounds `A` through the type of the base, and keeps it in f32. Ours has the precision of its
/// own type; who wants the former asks for an adapter in bf16.
#[test]
fn over_a_bf16_base_a_is_as_precise_as_the_adapters_type() {
    let is_bf16 = |tensor: &Tensor| {
        let rounded = tensor.to_dtype(DType::BF16).unwrap();
        to_vec(&rounded) == to_vec(tensor)
    };
    let base = randn(1, (30, 40), DType::BF16);
    for init in INITS {
        let draw = |config: PeftConfig| {
            let adapter = config.adapter().unwrap();
            LinearLoRA::new("q", base.clone(), None, &adapter).unwrap()
        };
        let master = draw(config(init, 8));
        assert_eq!(master.lora_a().dtype(), DType::F32);
        assert!(!is_bf16(master.lora_a()), "{init}");
        let half = draw(config(init, 8).lora_dtype(DType::BF16));
        assert_eq!(half.lora_a().dtype(), DType::BF16);
        let rounded = master.lora_a().to_dtype(DType::BF16).unwrap();
        assert!(relative_error(half.lora_a(), &rounded) < 1e-2, "{init}");
    }
}
