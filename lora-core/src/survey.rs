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
    pub adapted: bool,
}

/// The linear layers of a model in declaration order, and the size of everything.
#[derive(Default)]
pub(crate) struct Survey {
    pub sites: Vec<Site>,
    /// Numbers in all layers, adapters not counted; a tensor that two layers share counts once.
    pub parameters: usize,
    paths: HashSet<String>,
    tensors: HashSet<TensorId>,
}

impl Survey {
    /// Visits `model` and changes nothing.
    pub fn of<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Self> {
        let mut survey = Self::default();
        model.patch_linear(&mut ModulePath::root(), &mut survey)?;
        Ok(survey)
    }

    fn count(&mut self, tensor: &Tensor) {
        if self.tensors.insert(tensor.id()) {
            self.parameters += tensor.elem_count();
        }
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
        let (weight, bias) = match linear.lora() {
            Some(lora) => (lora.weight(), lora.bias()),
            None => (linear.weight(), linear.bias()),
        };
        self.count(weight);
        if let Some(bias) = bias {
            self.count(bias);
        }
        self.sites.push(Site {
            path: path.to_string(),
            head: path.is_head(),
            weight: weight.clone(),
            bias: bias.cloned(),
            adapted: linear.lora().is_some(),
        });
        Ok(())
    }

    fn parameter(&mut self, _: &ModulePath, _: &str, tensor: &mut Tensor) -> Result<()> {
        self.count(tensor);
        Ok(())
    }
}
