//! Models of candle_transformers, as they are, with adapters merged in.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
};

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, llama};
use lora_core::{MergedAdapters, adapter::AdapterWeights};
use lora_tests::{randn, relative_error};

use crate::golden;
use crate::merged::{adapter, layer};

const DEV: Device = Device::Cpu;

fn llama_config() -> llama::Config {
    llama::Config {
        hidden_size: 16,
        intermediate_size: 24,
        vocab_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        ..llama::Config::config_7b_v2(false)
    }
}

/// Every tensor of a small Llama.
fn llama_base() -> HashMap<String, Tensor> {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![32, 16]),
        ("model.norm.weight".to_string(), vec![16]),
        ("lm_head.weight".to_string(), vec![32, 16]),
    ];
    for i in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj", vec![16, 16]),
            ("self_attn.k_proj", vec![8, 16]),
            ("self_attn.v_proj", vec![8, 16]),
            ("self_attn.o_proj", vec![16, 16]),
            ("mlp.gate_proj", vec![24, 16]),
            ("mlp.up_proj", vec![24, 16]),
            ("mlp.down_proj", vec![16, 24]),
            ("input_layernorm", vec![16]),
            ("post_attention_layernorm", vec![16]),
        ] {
            shapes.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
    }
    let tensors = shapes.into_iter().zip(1..);
    tensors
        .map(|((name, shape), seed)| (name, (randn(seed, shape, DType::F32) * 0.3).unwrap()))
        .collect()
}

/// The logits of the last token.
fn llama_logits(vb: VarBuilder) -> Result<Tensor> {
    let config = llama_config();
    let model = llama::Llama::load(vb, &config)?;
    let mut cache = llama::Cache::new(false, DType::F32, &config, &DEV)?;
    model.forward(&Tensor::new(&[[3u32, 7, 1, 30, 12]], &DEV)?, 0, &mut cache)
}

/// `base` with `W + weight · scaling · B A` for every layer, in f64, and the whole tensors.
fn merged_by_hand(
    base: &HashMap<String, Tensor>,
    adapters: &[(AdapterWeights, f64)],
) -> HashMap<String, Tensor> {
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
    let mut tensors = base.clone();
    for (adapter, weight) in adapters {
        for (name, tensor) in &adapter.saved {
            tensors.insert(name.clone(), tensor.clone());
        }
        for (path, layer) in &adapter.layers {
            let delta = (wide(&layer.b).matmul(&wide(&layer.a)).unwrap()
                * (weight * layer.scaling()))
            .unwrap();
            let bias = layer
                .bias
                .as_ref()
                .map(|bias| (wide(bias) * (weight * layer.scaling())).unwrap());
            for (name, delta) in [
                (format!("{path}.weight"), Some(delta)),
                (format!("{path}.bias"), bias),
            ] {
                if let Some(delta) = delta {
                    let sum = (wide(&tensors[&name]) + delta).unwrap();
                    tensors.insert(name, sum);
                }
            }
        }
    }
    let narrow = |tensor: Tensor| tensor.to_dtype(DType::F32).unwrap();
    tensors
        .into_iter()
        .map(|(name, tensor)| (name, narrow(tensor)))
        .collect()
}

#[test]
fn llama_has_the_adapters_in_it() -> anyhow::Result<()> {
    let mut first = adapter([
        ("model.layers.0.self_attn.q_proj", layer(100, 16, 16)),
        ("model.layers.1.mlp.down_proj", layer(110, 24, 16)),
    ]);
    first.saved = BTreeMap::from([(
        "lm_head.weight".to_string(),
        randn(120, (32, 16), DType::F32),
    )]);
    let second = adapter([
        ("model.layers.1.self_attn.k_proj", layer(130, 16, 8)),
        ("model.layers.1.mlp.down_proj", layer(140, 24, 16)),
    ]);
    let adapters = [(first, 1.0), (second, -0.5)];
    let base = llama_base();
    let vb = |tensors: &HashMap<String, Tensor>| {
        VarBuilder::from_tensors(tensors.clone(), DType::F32, &DEV)
    };

    let merged = MergedAdapters::new(adapters.clone())?;
    let got = llama_logits(merged.var_builder(vb(&base)))?;
    merged.finish()?;
    let expected = llama_logits(vb(&merged_by_hand(&base, &adapters)))?;
    assert!(relative_error(&got, &expected) < 1e-5);
    assert!(relative_error(&got, &llama_logits(vb(&base))?) > 0.1);
    Ok(())
}

fn bert_config() -> bert::Config {
    bert::Config {
        vocab_size: 32,
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 24,
        max_position_embeddings: 64,
        ..bert::Config::default()
    }
}

/// Every tensor of a small BERT, below `prefix`.
fn bert_base(prefix: &str) -> HashMap<String, Tensor> {
    let mut shapes = vec![
        (
            "embeddings.word_embeddings.weight".to_string(),
            vec![32, 16],
        ),
        (
            "embeddings.position_embeddings.weight".to_string(),
            vec![64, 16],
        ),
        (
            "embeddings.token_type_embeddings.weight".to_string(),
            vec![2, 16],
        ),
        ("embeddings.LayerNorm.weight".to_string(), vec![16]),
        ("embeddings.LayerNorm.bias".to_string(), vec![16]),
    ];
    for i in 0..2 {
        for (name, shape) in [
            ("attention.self.query", vec![16, 16]),
            ("attention.self.key", vec![16, 16]),
            ("attention.self.value", vec![16, 16]),
            ("attention.output.dense", vec![16, 16]),
            ("attention.output.LayerNorm", vec![16]),
            ("intermediate.dense", vec![24, 16]),
            ("output.dense", vec![16, 24]),
            ("output.LayerNorm", vec![16]),
        ] {
            let bias = vec![shape[0]];
            shapes.push((format!("encoder.layer.{i}.{name}.weight"), shape));
            shapes.push((format!("encoder.layer.{i}.{name}.bias"), bias));
        }
    }
    let tensors = shapes.into_iter().zip(1..);
    tensors
        .map(|((name, shape), seed)| {
            (
                format!("{prefix}{name}"),
                (randn(seed, shape, DType::F32) * 0.3).unwrap(),
            )
        })
        .collect()
}

fn bert_states(vb: VarBuilder) -> Result<Tensor> {
    let model = bert::BertModel::load(vb, &bert_config())?;
    let ids = Tensor::new(&[[3u32, 7, 1, 30, 12], [4, 4, 9, 2, 0]], &DEV)?;
    model.forward(&ids, &ids.zeros_like()?, None)
}

/// Weights, a `lora_bias` and trained biases of the base.
fn bert_adapter() -> AdapterWeights {
    let mut value = layer(110, 16, 16);
    value.bias = Some(randn(115, 16, DType::F32));
    let mut adapter = adapter([
        (
            "bert.encoder.layer.0.attention.self.query",
            layer(100, 16, 16),
        ),
        ("bert.encoder.layer.1.attention.self.value", value),
    ]);
    adapter.saved = BTreeMap::from([
        (
            "bert.encoder.layer.0.output.dense.bias".to_string(),
            randn(120, 16, DType::F32),
        ),
        (
            "bert.encoder.layer.1.attention.self.value.bias".to_string(),
            randn(125, 16, DType::F32),
        ),
    ]);
    adapter
}

#[test]
fn bert_has_the_adapter_in_it_under_either_prefix() -> anyhow::Result<()> {
    let base = bert_base("bert.");
    let vb = |tensors: &HashMap<String, Tensor>| {
        VarBuilder::from_tensors(tensors.clone(), DType::F32, &DEV)
    };
    let expected = bert_states(vb(&merged_by_hand(&base, &[(bert_adapter(), 1.0)])))?;
    assert!(relative_error(&expected, &bert_states(vb(&base))?) > 0.1);

    // The model looks for its tensors without the prefix first, in vain.
    let merged = MergedAdapters::new([(bert_adapter(), 1.0)])?;
    let got = bert_states(merged.var_builder(vb(&base)))?;
    merged.finish()?;
    assert!(relative_error(&got, &expected) < 1e-5);

    // A file without the prefix, as sentence encoders have it.
    let bare = bert_base("");
    let unmerged = MergedAdapters::new([(bert_adapter(), 1.0)])?;
    bert_states(unmerged.var_builder(vb(&bare)))?;
    let error = unmerged.finish().unwrap_err().to_string();
    assert!(
        error.contains("replace the prefix \"bert\" by \"\""),
        "{error}"
    );
    let merged = unmerged.replace_prefix("bert", "")?;
    let got = bert_states(merged.var_builder(vb(&bare)))?;
    merged.finish()?;
    assert!(relative_error(&got, &expected) < 1e-5);
    Ok(())
}

#[test]
fn a_layer_that_a_model_ties_away_is_an_error() -> anyhow::Result<()> {
    let merged = MergedAdapters::new([(adapter([("lm_head", layer(100, 16, 32))]), 1.0)])?;
    let vb = merged.var_builder(VarBuilder::from_tensors(llama_base(), DType::F32, &DEV));
    let config = llama::Config {
        tie_word_embeddings: true,
        ..llama_config()
    };
    llama::Llama::load(vb, &config)?;
    let error = merged.finish().unwrap_err().to_string();
    assert!(
        error.contains("`lm_head.weight`: the model has no such tensor"),
        "{error}"
    );
    Ok(())
}

/// The tensors of a file in the folder of golden files.
fn tensors(file: &str) -> anyhow::Result<HashMap<String, Tensor>> {
    Ok(candle_core::safetensors::load(golden(file), &DEV)?)
}

fn config<T: serde::de::DeserializeOwned>(folder: &str) -> anyhow::Result<T> {
    let text = fs::read(golden(folder).join("config.json"))?;
    Ok(serde_json::from_slice(&text)?)
}

#[test]
fn llama_with_pefts_adapter_gives_pefts_logits() -> anyhow::Result<()> {
    let config = config::<llama::LlamaConfig>("llama/untied")?.into_config(false);
    for name in ["qv", "seven"] {
        let folder = format!("llama/untied/{name}");
        let adapter = AdapterWeights::read(golden(&folder))?;
        let expected = tensors(&format!("{folder}/expected.safetensors"))?;
        let merged = MergedAdapters::new([(adapter, 1.0)])?;
        let base = tensors("llama/untied/model.safetensors")?;
        let vb = merged.var_builder(VarBuilder::from_tensors(base, DType::F32, &DEV));
        let model = llama::Llama::load(vb, &config)?;
        merged.finish()?;
        let ids = expected["input_ids"].to_dtype(DType::U32)?;
        let mut cache = llama::Cache::new(false, DType::F32, &config, &DEV)?;
        let logits = model.forward(&ids, 0, &mut cache)?; // of the last token
        let last = expected["logits"].i((.., ids.dim(1)? - 1))?;
        let error = relative_error(&logits, &last);
        assert!(error < 1e-5, "{name}: {error}");
    }
    Ok(())
}

#[test]
fn bert_with_pefts_adapter_gives_pefts_states() -> anyhow::Result<()> {
    let config = config::<bert::Config>("settings/encoder")?;
    for name in [
        "lora_bias",
        "lora_bias_rslora",
        "bias_all",
        "bias_lora_only",
        "patterns",
    ] {
        let folder = format!("settings/encoder/{name}");
        let adapter = AdapterWeights::read(golden(&folder))?;
        let expected = tensors(&format!("{folder}/expected.safetensors"))?;
        let merged = MergedAdapters::new([(adapter, 1.0)])?;
        let base = tensors("settings/encoder/model.safetensors")?;
        let vb = merged.var_builder(VarBuilder::from_tensors(base, DType::F32, &DEV));
        let model = bert::BertModel::load(vb, &config)?;
        if name == "bias_all" {
            // This BERT has no pooler, which the adapter trained.
            assert_eq!(merged.unused(), ["pooler.dense.bias"]);
            assert!(merged.finish().is_err());
        } else {
            merged.finish()?;
        }
        let [ids, mask] =
            ["input_ids", "attention_mask"].map(|name| expected[name].to_dtype(DType::U32));
        let ids = ids?;
        let states = model.forward(&ids, &ids.zeros_like()?, Some(&mask?))?;
        let error = relative_error(&states, &expected["output"]);
        assert!(error < 1e-5, "{name}: {error}");
    }
    Ok(())
}
