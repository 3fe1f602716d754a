//! The model of the tests: two kinds of block, a head, paths of several segments.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use lora_core::{
    LoraTargets,
    nn::{Linear, linear, linear_no_bias},
};
use lora_tests::{randn, to_vec};

pub const WIDTH: usize = 12;

#[derive(LoraTargets)]
pub struct Attention {
    pub q_proj: Linear,
    pub v_proj: Linear,
}

#[derive(LoraTargets)]
pub struct Block {
    pub self_attn: Attention,
    pub up_proj: Linear,
    pub gate: Option<Linear>,
}

#[derive(LoraTargets)]
pub struct Model {
    #[lora(rename = "model.layers")]
    pub layers: Vec<Block>,
    #[lora(head)]
    pub lm_head: Linear,
}

impl Model {
    pub fn new(layers: usize, vb: VarBuilder) -> Result<Self> {
        let block = |i| {
            let vb = vb.pp(format!("model.layers.{i}"));
            Ok(Block {
                self_attn: Attention {
                    q_proj: linear(WIDTH, WIDTH, vb.pp("self_attn.q_proj"))?,
                    v_proj: linear_no_bias(WIDTH, WIDTH, vb.pp("self_attn.v_proj"))?,
                },
                up_proj: linear_no_bias(WIDTH, WIDTH, vb.pp("up_proj"))?,
                gate: None,
            })
        };
        Ok(Self {
            layers: (0..layers).map(block).collect::<Result<_>>()?,
            lm_head: linear_no_bias(WIDTH, 5, vb.pp("lm_head"))?,
        })
    }

    pub fn random(layers: usize, dtype: DType) -> Self {
        let mut tensors = std::collections::HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let tensor = randn(tensors.len() as u32, shape, DType::F64);
            let tensor = (tensor * 0.3)
                .and_then(|tensor| tensor.to_dtype(dtype))
                .unwrap();
            tensors.insert(name, tensor);
        };
        for i in 0..layers {
            for name in ["self_attn.q_proj", "self_attn.v_proj", "up_proj"] {
                add(format!("model.layers.{i}.{name}.weight"), &[WIDTH, WIDTH]);
            }
            add(format!("model.layers.{i}.self_attn.q_proj.bias"), &[WIDTH]);
        }
        add("lm_head.weight".into(), &[5, WIDTH]);
        let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
        Self::new(layers, vb).unwrap()
    }

    /// Fills every `B`, so that the adapters act.
    pub fn randomise(&mut self) {
        for (i, (name, var)) in self.named_lora_vars().unwrap().into_iter().enumerate() {
            if name.ends_with("lora_B.weight") {
                var.set(&randn(100 + i as u32, var.shape(), var.dtype()))
                    .unwrap();
            }
        }
    }

    pub fn paths(&mut self) -> Vec<String> {
        let report = self.lora_report().unwrap();
        report.sites.into_iter().map(|site| site.path).collect()
    }

    /// Everything that could have changed, by path.
    pub fn snapshot(&mut self) -> BTreeMap<String, (Vec<f64>, bool)> {
        let mut all = BTreeMap::new();
        self.for_each_linear(&mut |path, linear| {
            all.insert(
                path.to_string(),
                (to_vec(linear.weight()), linear.lora().is_some()),
            );
            Ok(())
        })
        .unwrap();
        all
    }
}

impl Module for Model {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let mut xs = xs.clone();
        for block in &self.layers {
            let q = block.self_attn.q_proj.forward(&xs)?.tanh()?;
            let v = block.self_attn.v_proj.forward(&xs)?;
            xs = (xs + block.up_proj.forward(&(q * v)?)?)?;
        }
        self.lm_head.forward(&xs)
    }
}

pub fn input(dtype: DType) -> Tensor {
    randn(77, (3, 4, WIDTH), dtype)
}

/// No gradient is kept for a weight or a bias of the base.
pub fn no_base_gradient(model: &mut Model, grads: &candle_core::backprop::GradStore) {
    model
        .for_each_linear(&mut |path, linear| {
            assert!(grads.get(linear.weight()).is_none(), "{path}.weight");
            let bias = linear.bias().and_then(|bias| grads.get(bias));
            assert!(bias.is_none(), "{path}.bias");
            Ok(())
        })
        .unwrap();
    // Nor for a transposed view of it, under which candle's product would keep it.
    let shapes = grads
        .get_ids()
        .filter_map(|id| grads.get_id(*id))
        .map(|grad| grad.dims());
    assert!(shapes.filter(|dims| **dims == [WIDTH, WIDTH]).count() == 0);
}
