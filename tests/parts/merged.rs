//! `MergedAdapters`: what it gives, and what it says when something does not fit.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use lora_core::{
    LinearLoRA, MergedAdapters, PeftConfig,
    adapter::{AdapterWeights, Fingerprint, LayerWeights},
};
use lora_tests::{randn, to_vec};

const DEV: Device = Device::Cpu;

/// A layer of rank 2 and scaling 1.5 whose numbers depend on `seed` alone.
pub fn layer(seed: u32, inputs: usize, outputs: usize) -> LayerWeights {
    LayerWeights {
        a: randn(seed, (2, inputs), DType::F32),
        b: randn(seed + 1, (outputs, 2), DType::F32),
        bias: None,
        alpha: 3.0,
        rslora: false,
    }
}

pub fn adapter(layers: impl IntoIterator<Item = (&'static str, LayerWeights)>) -> AdapterWeights {
    AdapterWeights {
        layers: layers
            .into_iter()
            .map(|(path, layer)| (path.to_string(), layer))
            .collect(),
        ..AdapterWeights::default()
    }
}

/// A base of one layer, `proj`, 6 to 4.
fn base(dtype: DType) -> HashMap<String, Tensor> {
    HashMap::from([
        ("proj.weight".to_string(), randn(1, (4, 6), dtype)),
        ("proj.bias".to_string(), randn(2, 4, dtype)),
    ])
}

fn linear(
    merged: &MergedAdapters,
    base: HashMap<String, Tensor>,
    dtype: DType,
) -> Result<candle_nn::Linear> {
    let vb = merged.var_builder(VarBuilder::from_tensors(base, dtype, &DEV));
    candle_nn::linear(6, 4, vb.pp("proj"))
}

#[test]
fn the_weight_is_the_one_that_a_layer_of_ours_merges() -> anyhow::Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let weights = layer(10, 6, 4);
        let config = PeftConfig::all_linear().dim(2).alpha(3.0).adapter()?;
        let lora = LinearLoRA::new("proj", base(dtype)["proj.weight"].clone(), None, &config)?;
        lora.lora_a()
            .set(&weights.a.to_dtype(lora.lora_a().dtype())?)?;
        lora.lora_b()
            .set(&weights.b.to_dtype(lora.lora_b().dtype())?)?;

        let merged = MergedAdapters::new([(adapter([("proj", weights)]), 1.0)])?;
        let got = linear(&merged, base(dtype), dtype)?;
        merged.finish()?;
        assert_eq!(got.weight().dtype(), dtype);
        assert_eq!(to_vec(got.weight()), to_vec(&lora.merged_weight()?));
        assert_eq!(
            to_vec(got.bias().unwrap()),
            to_vec(&base(dtype)["proj.bias"])
        );
    }
    Ok(())
}

#[test]
fn a_weight_that_is_narrowed_is_rounded_once() -> anyhow::Result<()> {
    let weights = layer(10, 6, 4);
    let exact = (weights.b.matmul(&weights.a)? * 1.5 + &base(DType::F32)["proj.weight"])?;
    let merged = MergedAdapters::new([(adapter([("proj", weights)]), 1.0)])?;
    let got = linear(&merged, base(DType::F32), DType::BF16)?;
    assert_eq!(to_vec(got.weight()), to_vec(&exact.to_dtype(DType::BF16)?));
    Ok(())
}

#[test]
fn adapters_add_up_by_their_weights() -> anyhow::Result<()> {
    let (mut x, mut y) = (layer(10, 6, 4), layer(20, 6, 4));
    x.bias = Some(randn(30, 4, DType::F32));
    y.rslora = true; // scaling 3 / √2
    let xs = randn(40, (5, 6), DType::F32);
    let output = |layer: &LayerWeights| -> Result<Tensor> {
        let ys = xs.matmul(&layer.a.t()?)?.matmul(&layer.b.t()?)?;
        match &layer.bias {
            Some(bias) => ys.broadcast_add(bias)? * layer.scaling(),
            None => ys * layer.scaling(),
        }
    };
    let expected = (linear(&MergedAdapters::new([])?, base(DType::F32), DType::F32)?
        .forward(&xs)?
        + (output(&x)? * 0.5)?
        - (output(&y)? * 2.0)?)?;
    let adapters = [
        (adapter([("proj", x)]), 0.5),
        (adapter([("proj", y)]), -2.0),
    ];
    let merged = MergedAdapters::new(adapters)?;
    let got = linear(&merged, base(DType::F32), DType::F32)?.forward(&xs)?;
    merged.finish()?;
    assert!(lora_tests::relative_error(&got, &expected) < 1e-6);
    Ok(())
}

#[test]
fn whole_tensors_take_the_place_of_the_models() -> anyhow::Result<()> {
    let mut weights = layer(10, 6, 4);
    weights.bias = Some(randn(30, 4, DType::F32));
    let mut adapter = adapter([("proj", weights.clone())]);
    let trained = randn(50, 4, DType::F64);
    adapter.saved = BTreeMap::from([
        ("proj.bias".to_string(), trained.clone()),
        ("head.weight".to_string(), randn(60, (3, 4), DType::F32)),
    ]);
    let merged = MergedAdapters::new([(adapter, 1.0)])?;
    let vb = merged.var_builder(VarBuilder::from_tensors(base(DType::F32), DType::F32, &DEV));
    // The model has no head; the adapter brings it.
    assert!(vb.contains_tensor("head.weight") && !vb.contains_tensor("head.bias"));
    let head = candle_nn::linear_no_bias(4, 3, vb.pp("head"))?;
    assert_eq!(
        to_vec(head.weight()),
        to_vec(&randn(60, (3, 4), DType::F32))
    );
    let bias = candle_nn::linear(6, 4, vb.pp("proj"))?
        .bias()
        .unwrap()
        .clone();
    let expected = (trained.to_dtype(DType::F32)? + (weights.bias.unwrap() * 1.5)?)?;
    assert_eq!(to_vec(&bias), to_vec(&expected));
    merged.finish()?;
    Ok(())
}

#[test]
fn what_nobody_asked_for_is_named_with_the_way_out() -> anyhow::Result<()> {
    let mut biased = layer(10, 6, 4);
    biased.bias = Some(randn(30, 4, DType::F32));
    let adapters = adapter([
        ("model.proj", layer(10, 6, 4)),
        ("j", layer(10, 6, 4)),
        ("up", biased),
    ]);
    let merged = MergedAdapters::new([(adapters, 1.0)])?;
    let up = HashMap::from([("up.weight".to_string(), randn(1, (4, 6), DType::F32))]);
    let base = base(DType::F32).into_iter().chain(up).collect();
    let vb = merged.var_builder(VarBuilder::from_tensors(base, DType::F32, &DEV));
    candle_nn::linear(6, 4, vb.pp("proj"))?;
    candle_nn::linear_no_bias(6, 4, vb.pp("up"))?;
    assert_eq!(
        merged.finish().unwrap_err().to_string(),
        "not merged: `j.weight`: the model has no such tensor; \
         `model.proj.weight`: the model calls it `proj.weight`; \
         replace the prefix \"model\" by \"\"; \
         `up.bias`: the layer has no bias in this model that could take it"
    );
    Ok(())
}

#[test]
fn prefixes_can_be_added_and_taken_off() -> anyhow::Result<()> {
    let weights = layer(10, 6, 4);
    let expected = (weights.b.matmul(&weights.a)? * 1.5 + &base(DType::F32)["proj.weight"])?;
    for (path, from, to) in [
        ("a.b.proj", "a.b", ""),
        ("proj", "", ""),
        ("old.proj", "old", ""),
    ] {
        let merged = MergedAdapters::new([(adapter([(path, weights.clone())]), 1.0)])?;
        let merged = merged.replace_prefix(from, to)?;
        let got = linear(&merged, base(DType::F32), DType::F32)?;
        merged.finish()?;
        assert_eq!(to_vec(got.weight()), to_vec(&expected), "{path}");
    }
    // The builder's own prefix counts.
    let merged =
        MergedAdapters::new([(adapter([("proj", weights)]), 1.0)])?.replace_prefix("", "enc")?;
    assert_eq!(merged.names().collect::<Vec<_>>(), ["enc.proj.weight"]);
    let nested = base(DType::F32)
        .into_iter()
        .map(|(name, tensor)| (format!("enc.{name}"), tensor));
    let vb = VarBuilder::from_tensors(nested.collect(), DType::F32, &DEV);
    let vb = merged.var_builder(vb.pp("enc"));
    let got = candle_nn::linear(6, 4, vb.pp("proj"))?;
    merged.finish()?;
    assert_eq!(to_vec(got.weight()), to_vec(&expected));

    let both = adapter([("x.proj", layer(10, 6, 4)), ("proj", layer(10, 6, 4))]);
    let error = MergedAdapters::new([(both, 1.0)])?
        .replace_prefix("x", "")
        .unwrap_err();
    assert!(
        error.to_string().starts_with("proj.weight: two tensors"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_tensor_asked_for_in_vain_is_not_merged() -> anyhow::Result<()> {
    let merged = MergedAdapters::new([(adapter([("proj", layer(10, 6, 4))]), 1.0)])?;
    assert!(linear(&merged, HashMap::new(), DType::F32).is_err());
    assert!(merged.finish().is_err());
    linear(&merged, base(DType::F32), DType::F32)?;
    merged.finish()?;
    Ok(())
}

#[test]
fn what_does_not_fit_names_the_tensor() -> anyhow::Result<()> {
    let error = |layers| -> String {
        let merged = MergedAdapters::new([(adapter([("proj", layers)]), 1.0)]).unwrap();
        linear(&merged, base(DType::F32), DType::F32)
            .unwrap_err()
            .to_string()
    };
    let message = error(layer(10, 7, 4));
    assert!(
        message.contains("`proj.weight` is [4, 6] in the model and [4, 7] in the adapter"),
        "{message}"
    );
    let mut infinite = layer(10, 6, 4);
    infinite.a = (infinite.a * 1e30)?;
    infinite.b = (infinite.b * 1e30)?;
    let message = error(infinite);
    assert!(
        message.contains("`proj.weight` has values that are not finite"),
        "{message}"
    );

    let crooked = LayerWeights {
        a: randn(1, (3, 6), DType::F32),
        ..layer(10, 6, 4)
    };
    let message = MergedAdapters::new([(adapter([("proj", crooked)]), 1.0)])
        .unwrap_err()
        .to_string();
    assert!(message.starts_with("proj: A [3, 6], B [4, 2]"), "{message}");
    let message = MergedAdapters::new([(adapter([("proj", layer(1, 6, 4))]), f64::NAN)])
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "proj: the adapter's scaling is NaN; it must be finite"
    );

    let saved = || AdapterWeights {
        saved: BTreeMap::from([("head.weight".to_string(), randn(1, (3, 4), DType::F32))]),
        ..AdapterWeights::default()
    };
    let message = MergedAdapters::new([(saved(), 1.0), (saved(), 1.0)])
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("head.weight: ") && message.contains("one of them only"),
        "{message}"
    );
    let message = MergedAdapters::new([(saved(), 0.5)])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("merge this adapter with weight 1"),
        "{message}"
    );
    let merged = MergedAdapters::new([(saved(), 1.0)])?;
    let vb = merged.var_builder(VarBuilder::zeros(DType::F32, &DEV));
    let message = candle_nn::linear_no_bias(4, 5, vb.pp("head"))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("`head.weight` is [5, 4] in the model and [3, 4] in the adapter"),
        "{message}"
    );
    let message = merged
        .merge("head.weight", &randn(1, (5, 4), DType::F32))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("`head.weight` is [5, 4] in the model"),
        "{message}"
    );
    Ok(())
}

#[test]
fn a_fused_projection_is_refused_by_the_names_of_its_parts() -> anyhow::Result<()> {
    let layers = [
        ("attn.q_proj", layer(1, 6, 4)),
        ("attn.v_proj", layer(1, 6, 4)),
    ];
    let merged = MergedAdapters::new([(adapter(layers), 1.0)])?;
    let vb = merged.var_builder(VarBuilder::zeros(DType::F32, &DEV));
    let error = candle_nn::linear_no_bias(6, 12, vb.pp("attn.qkv_proj"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("attn.q_proj, attn.v_proj"), "{error}");
    // An adapter of the fused layer itself is one like any other.
    let merged = MergedAdapters::new([(adapter([("attn.qkv_proj", layer(1, 6, 12))]), 1.0)])?;
    let vb = merged.var_builder(VarBuilder::zeros(DType::F32, &DEV));
    candle_nn::linear_no_bias(6, 12, vb.pp("attn.qkv_proj"))?;
    merged.finish()?;
    Ok(())
}

#[test]
fn tensors_in_hand_are_merged_the_same_way() -> anyhow::Result<()> {
    let merged = MergedAdapters::new([(adapter([("proj", layer(10, 6, 4))]), 1.0)])?;
    let base = base(DType::BF16);
    assert!(merged.merge("proj.bias", &base["proj.bias"])?.is_none());
    assert!(merged.finish().is_err());
    let got = merged.merge("proj.weight", &base["proj.weight"])?.unwrap();
    merged.finish()?;
    let expected = linear(&merged, base, DType::BF16)?;
    assert_eq!(to_vec(&got), to_vec(expected.weight()));
    Ok(())
}

#[test]
fn an_adapter_of_another_base_is_refused_once_all_of_it_is_in() -> anyhow::Result<()> {
    let own = base(DType::F32);
    let mut of_own = adapter([("proj", layer(10, 6, 4))]);
    let fingerprint = Fingerprint::of([("proj", &own["proj.weight"])])?;
    of_own.origin.fingerprint = Some(fingerprint);
    let merged = MergedAdapters::new([(of_own.clone(), 1.0)])?;
    linear(&merged, own.clone(), DType::BF16)?; // in another type, but the same
    merged.finish()?;

    let mut other = own.clone();
    other.insert("proj.weight".to_string(), randn(99, (4, 6), DType::F32));
    let merged = MergedAdapters::new([(of_own.clone(), 1.0)])?;
    linear(&merged, other.clone(), DType::F32)?;
    let error = merged.finish().expect_err("another base").to_string();
    assert!(
        error.starts_with("the adapter was trained on another base"),
        "{error}"
    );

    // By another name, and as tensors.
    let merged = MergedAdapters::new([(of_own.clone(), 1.0)])?.replace_prefix("", "model")?;
    merged.merge("model.proj.weight", &own["proj.weight"])?;
    merged.finish()?;
    let merged = MergedAdapters::new([(of_own.clone(), 1.0)])?.replace_prefix("", "model")?;
    merged.merge("model.proj.weight", &other["proj.weight"])?;
    assert!(merged.finish().is_err());

    of_own.origin.fingerprint = None;
    let merged = MergedAdapters::new([(of_own, 1.0)])?;
    linear(&merged, other, DType::F32)?;
    merged.finish()?;
    Ok(())
}

#[test]
fn a_quantised_base_is_refused_by_name() -> anyhow::Result<()> {
    let merged = MergedAdapters::new([(adapter([("proj", layer(10, 6, 4))]), 1.0)])?;
    let codes = Tensor::zeros((4, 6), DType::U8, &DEV)?;
    let error = merged
        .merge("proj.weight", &codes)
        .expect_err("codes")
        .to_string();
    assert!(error.contains("`proj.weight` is of u8"), "{error}");
    Ok(())
}
