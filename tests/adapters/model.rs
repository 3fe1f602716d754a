//! The model of the tests: linear layers with and without a bias, an embedding, two kinds of norm.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Module, Result, Tensor};
use lora_core::{
    LoraTargets, ModulePath, PeftConfig, Visitor,
    nn::{Embedding, LayerNorm, Linear, RmsNorm},
};
use lora_tests::{randn, to_vec};

pub const WIDTH: usize = 12;
pub const VOCABULARY: usize = 7;

#[derive(Clone, LoraTargets)]
pub struct Block {
    pub norm: LayerNorm,
    pub q_proj: Linear,
    pub up_proj: Linear,
}

#[derive(Clone, LoraTargets)]
pub struct Model {
    pub embed: Embedding,
    pub layers: Vec<Block>,
    pub norm: RmsNorm,
    #[lora(head)]
    pub head: Linear,
}

impl Model {
    pub fn new(dtype: DType) -> Self {
        let mut seed = 0;
        let mut random = |shape: &[usize]| {
            seed += 1;
            (randn(seed, shape, DType::F64) * 0.3)
                .and_then(|tensor| tensor.to_dtype(dtype))
                .unwrap()
        };
        let ones = Tensor::ones(WIDTH, dtype, &Device::Cpu).unwrap();
        let layers = (0..2).map(|_| Block {
            norm: LayerNorm::new(ones.clone(), random(&[WIDTH]), 1e-5),
            q_proj: Linear::new(random(&[WIDTH, WIDTH]), Some(random(&[WIDTH]))),
            up_proj: Linear::new(random(&[WIDTH, WIDTH]), None),
        });
        Self {
            layers: layers.collect(),
            norm: RmsNorm::new(ones.clone(), 1e-6),
            head: Linear::new(random(&[5, WIDTH]), Some(random(&[5]))),
            embed: Embedding::new(random(&[VOCABULARY, WIDTH]), WIDTH),
        }
    }

    /// With the adapters `a` (rank 2, q_proj), `b` (rank 3, all linear layers) and `c` (rank 1,
    /// layer 1), none of them active.
    pub fn with_three(dtype: DType) -> Self {
        let mut model = Self::new(dtype);
        model.add("a", &PeftConfig::new(["q_proj"]).dim(2).alpha(3.0));
        model.add("b", &PeftConfig::all_linear().dim(3).alpha(1.5));
        model.add("c", &PeftConfig::new(["layers.1.*"]).dim(1).alpha(2.0));
        model
    }

    /// Adds an adapter that acts, in evaluation mode.
    pub fn add(&mut self, name: &str, config: &PeftConfig) {
        self.add_adapter(name, config).unwrap();
        self.fill(name);
        self.eval().unwrap();
    }

    /// Gives an adapter numbers that depend on its name.
    pub fn fill(&mut self, name: &str) {
        let seed = name
            .bytes()
            .fold(1000, |seed, byte| seed * 7 + u32::from(byte));
        for (i, var) in self.adapter_vars(name).unwrap().iter().enumerate() {
            let fresh = randn(seed + i as u32, var.shape(), var.dtype());
            var.set(&(fresh * 0.5).unwrap()).unwrap();
        }
    }

    /// Puts tensors in the places of those that they are named for.
    pub fn replace(&mut self, tensors: &BTreeMap<String, Tensor>) {
        struct Replace<'a>(&'a BTreeMap<String, Tensor>);

        impl Visitor for Replace<'_> {
            fn linear(&mut self, path: &ModulePath, linear: &mut Linear) -> lora_core::Result<()> {
                let new = |name: &str| self.0.get(&format!("{path}.{name}"));
                let weight = new("weight").unwrap_or(linear.weight()).clone();
                *linear = Linear::new(weight, new("bias").or(linear.bias()).cloned());
                Ok(())
            }

            fn parameter(
                &mut self,
                path: &ModulePath,
                name: &str,
                tensor: &mut Tensor,
            ) -> lora_core::Result<()> {
                if let Some(new) = self.0.get(&format!("{path}.{name}")) {
                    *tensor = new.clone();
                }
                Ok(())
            }
        }

        self.patch_linear(&mut ModulePath::root(), &mut Replace(tensors))
            .unwrap();
    }

    /// What the model computes with these adapters, as `set_adapters` sees it.
    pub fn sum_of(&mut self, names: &[&str], ids: &Tensor) -> Tensor {
        self.set_adapters(names).unwrap();
        self.forward(ids).unwrap()
    }

    /// Everything about the adapters and the weights that a refused verb must leave alone.
    pub fn snapshot(&mut self) -> (Vec<(String, Vec<f64>)>, String) {
        let mut weights = Vec::new();
        self.for_each_linear(&mut |path, linear| {
            weights.push((path.to_string(), to_vec(linear.weight())));
            Ok(())
        })
        .unwrap();
        let status = self.adapter_status().unwrap();
        for line in &status {
            for (name, var) in self.named_adapter_vars(&line.name).unwrap() {
                weights.push((format!("{}: {name}", line.name), to_vec(&var)));
            }
        }
        (weights, format!("{status:?}"))
    }
}

impl Module for Model {
    /// Logits `[batch, tokens, 5]` of ids `[batch, tokens]`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut xs = self.embed.forward(ids)?;
        for block in &self.layers {
            let ys = block.q_proj.forward(&block.norm.forward(&xs)?)?.tanh()?;
            xs = (xs + block.up_proj.forward(&ys)?)?;
        }
        self.head.forward(&self.norm.forward(&xs)?)
    }
}

/// Ids `[batch, 3]`.
pub fn ids(batch: usize) -> Tensor {
    let ids = (0..batch * 3).map(|i| ((i * i + i / 3) % VOCABULARY) as u32);
    Tensor::from_iter(ids, &Device::Cpu)
        .and_then(|ids| ids.reshape((batch, 3)))
        .unwrap()
}

/// The message of an error.
pub fn message<T>(result: lora_core::Result<T>) -> String {
    match result {
        Ok(_) => panic!("this must be refused"),
        Err(error) => error.to_string(),
    }
}
