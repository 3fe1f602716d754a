//! Models of any paths, and one of every kind of layer.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lora_core::{
    LoraPlan, LoraTargets, ModulePath, PeftConfig, Result, TargetTree, Visitor,
    nn::{Embedding, LayerNorm, Linear},
};
use lora_tests::randn;
use serde_json::Value;

/// Linear layers of given paths.
pub struct Paths(Vec<(String, Linear)>);

impl Paths {
    /// Layers from 3 to 4 features.
    pub fn new(paths: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let layer = |(seed, path): (usize, _)| (Into::into(path), linear(seed as u32, 4, 3));
        Self(paths.into_iter().enumerate().map(layer).collect())
    }

    pub fn one(path: &str, layer: Linear) -> Self {
        Self(vec![(path.to_string(), layer)])
    }

    /// The layer at `path`.
    pub fn get(&self, path: &str) -> &Linear {
        let found = self.0.iter().find(|(known, _)| known == path);
        &found.expect("a path of the model").1
    }
}

impl LoraTargets for Paths {
    const TARGETS: TargetTree = TargetTree::Keyed(&TargetTree::Linear);

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        for (name, linear) in &mut self.0 {
            path.enter(name, |path| linear.patch_linear(path, visitor))?;
        }
        Ok(())
    }
}

pub fn linear(seed: u32, outputs: usize, inputs: usize) -> Linear {
    Linear::new(randn(seed, (outputs, inputs), DType::F32), None)
}

fn with_bias(seed: u32, outputs: usize, inputs: usize) -> Linear {
    let bias = randn(seed + 1, outputs, DType::F32);
    Linear::new(randn(seed, (outputs, inputs), DType::F32), Some(bias))
}

#[derive(LoraTargets)]
pub struct Mixture {
    pub gate: Linear,
    pub experts: Vec<Expert>,
}

#[derive(LoraTargets)]
pub struct Expert {
    pub up_proj: Linear,
    pub down_proj: Linear,
}

#[derive(LoraTargets)]
pub struct Block {
    pub norm: LayerNorm,
    pub q_proj: Linear,
    pub v_proj: Linear,
    pub mlp: Mixture,
}

/// Three layers with two experts each; biases in `q_proj`, in the norms and in the pooler.
#[derive(LoraTargets)]
pub struct Transformer {
    pub embed: Embedding,
    pub layers: Vec<Block>,
    pub pooler: Pooler,
    #[lora(head)]
    pub lm_head: Linear,
}

#[derive(LoraTargets)]
pub struct Pooler {
    pub dense: Linear,
    pub norm: LayerNorm,
}

pub const WIDTH: usize = 6;
pub const INNER: usize = 10;
pub const WORDS: usize = 8;

impl Transformer {
    pub fn new() -> Self {
        let norm = || {
            let ones = Tensor::ones(WIDTH, DType::F32, &Device::Cpu).unwrap();
            LayerNorm::new(ones.clone(), ones.zeros_like().unwrap(), 1e-5)
        };
        let expert = |seed| Expert {
            up_proj: linear(seed, INNER, WIDTH),
            down_proj: linear(seed + 1, WIDTH, INNER),
        };
        let block = |i: u32| Block {
            norm: norm(),
            q_proj: with_bias(100 * i, WIDTH, WIDTH),
            v_proj: linear(100 * i + 2, WIDTH, WIDTH),
            mlp: Mixture {
                gate: linear(100 * i + 3, 2, WIDTH),
                experts: (0..2).map(|j| expert(100 * i + 10 * j + 4)).collect(),
            },
        };
        Self {
            embed: Embedding::new(randn(7, (WORDS, WIDTH), DType::F32), WIDTH),
            layers: (0..3).map(block).collect(),
            pooler: Pooler {
                dense: with_bias(8, WIDTH, WIDTH),
                norm: norm(),
            },
            lm_head: linear(9, WORDS, WIDTH),
        }
    }
}

/// The paths that a plan adapts.
pub fn adapted(plan: &LoraPlan) -> Vec<&str> {
    plan.adapted.iter().map(|it| it.path.as_str()).collect()
}

/// What `config` adapts in a model of these paths.
pub fn reached(paths: &[&str], config: &PeftConfig) -> Result<Vec<String>> {
    let plan = Paths::new(paths.iter().copied()).lora_plan(config)?;
    Ok(adapted(&plan).into_iter().map(String::from).collect())
}

/// The error of planning, which applying must repeat.
pub fn refusal<M: LoraTargets>(mut model: M, config: &PeftConfig) -> String {
    let planned = model.lora_plan(config).unwrap_err().to_string();
    let applied = model.apply_lora(config).unwrap_err().to_string();
    assert_eq!(planned, applied);
    assert!(model.lora_report().unwrap().sites.is_empty());
    planned
}

/// Rank and alpha by path.
pub fn ranks_and_alphas(plan: &LoraPlan) -> BTreeMap<String, (usize, f64)> {
    let entry = |it: &lora_core::PlannedAdapter| (it.path.clone(), (it.rank, it.alpha));
    plan.adapted.iter().map(entry).collect()
}

/// Reads a configuration from JSON.
pub fn read(fields: Value) -> Result<PeftConfig> {
    PeftConfig::from_dict(fields.as_object().expect("an object"))
}
