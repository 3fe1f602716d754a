//! What a model holds before anything is changed.

use std::collections::HashSet;

use candle_core::{Tensor, TensorId};

use crate::{Error, LoraTargets, ModulePath, Result, Visitor, nn::Linear};

/// A linear layer of a model.
pub(crate) struct Site {
    pub path: String,
    pub head: bool,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// A parameter of a model, be it of a linear layer or of another.
pub(crate) struct Parameter {
    /// The path of its module.
    pub path: String,
    /// Its name in the module: `weight` or `bias`.
    pub name: String,
    pub tensor: Tensor,
}

/// The linear layers of a model in declaration order, and the size of everything.
#[derive(Default)]
pub(crate) struct Survey {
    pub sites: Vec<Site>,
    /// Everything that could be trained, adapters not counted, in declaration order.
    pub tensors: Vec<Parameter>,
    /// Numbers in all layers, adapters not counted; a tensor that two layers share counts once.
    pub parameters: usize,
    paths: HashSet<String>,
    counted: HashSet<TensorId>,
}

impl Survey {
    /// Visits `model` and changes nothing.
    pub fn of<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Self> {
        let mut survey = Self::default();
        model.patch_linear(&mut ModulePath::root(), &mut survey)?;
        Ok(survey)
    }

    fn add(&mut self, path: &ModulePath, name: &str, tensor: &Tensor) {
        if self.counted.insert(tensor.id()) {
            self.parameters += tensor.elem_count();
        }
        self.tensors.push(Parameter {
            path: path.to_string(),
            name: name.to_string(),
            tensor: tensor.clone(),
        });
    }
}

impl Visitor for Survey {
    fn linear(&mut self, path: &ModulePath, linear: &mut Linear) -> Result<()> {
        if !self.paths.insert(path.to_string()) {
            let reason =
                "two linear layers have this path; rename a field on the way to one of them";
            return Err(Error::module(path, reason));
        }
        if let Some(prefix) = linear.path()
            && prefix != path.as_str()
        {
            let reason = format!(
                "its weights came from `{prefix}`, the name by which other programs know this \
                 layer; make the paths agree with `#[lora(rename = \"..\")]` or \
                 `#[lora(flatten)]` on the fields on the way"
            );
            return Err(Error::module(path, reason));
        }
        let (weight, bias) = match linear.adapted() {
            Some(lora) => (lora.weight(), lora.bias()),
            None => (linear.weight(), linear.bias()),
        };
        self.add(path, "weight", weight);
        if let Some(bias) = bias {
            self.add(path, "bias", bias);
        }
        self.sites.push(Site {
            path: path.to_string(),
            head: path.is_head(),
            weight: weight.clone(),
            bias: bias.cloned(),
        });
        Ok(())
    }

    fn parameter(&mut self, path: &ModulePath, name: &str, tensor: &mut Tensor) -> Result<()> {
        self.add(path, name, tensor);
        Ok(())
    }
}
