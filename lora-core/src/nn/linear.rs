//! The linear layer that can carry an adapter.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use crate::{
    LinearLoRA, LoraAdapter,
    linear_lora::Sharing,
    op::{FrozenLinear, over_rows},
    selection::Pick,
    switch::{AdapterId, MergedLayer, Switch},
    trained::Trained,
};

/// `ys = xs Wᵀ + b`, in place of `candle_nn::Linear`; plain, adapted or merged.
///
/// Plain, it computes what `candle_nn::Linear` does, bit for bit, but a weight that is not
/// trained costs nothing in the backward pass.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use lora_core::nn::linear_no_bias;
///
/// let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let layer = linear_no_bias(3, 2, vb.pp("layers.0.q_proj"))?;
/// assert_eq!(layer.path(), Some("layers.0.q_proj"));
/// assert_eq!(layer.forward(&Tensor::ones((5, 3), DType::F32, &Device::Cpu)?)?.dims(), [5, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    state: State,
    path: Option<Arc<str>>,
}

#[derive(Clone, Debug)]
enum State {
    Plain(candle_nn::Linear),
    Adapted(Box<LinearLoRA>),
    Merged(Box<Merged>),
}

/// A layer with adapters in its weight, and what it was before.
#[derive(Clone, Debug)]
struct Merged {
    linear: candle_nn::Linear,
    picks: Vec<Pick>,
    lora: LinearLoRA,
    _counted: MergedLayer,
}

impl Linear {
    /// A layer of a weight `[out, in]` and a bias `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            state: State::Plain(candle_nn::Linear::new(weight, bias)),
            path: None,
        }
    }

    /// The same as [`new`](Self::new), under the name that `candle_transformers` uses.
    pub fn from_weights(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self::new(weight, bias)
    }

    /// The weight that the layer multiplies by, `[out, in]`: the merged one if it is merged.
    pub fn weight(&self) -> &Tensor {
        match &self.state {
            State::Plain(linear) => linear.weight(),
            State::Adapted(lora) => lora.weight(),
            State::Merged(merged) => merged.linear.weight(),
        }
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        match &self.state {
            State::Plain(linear) => linear.bias(),
            State::Adapted(lora) => lora.bias(),
            State::Merged(merged) => merged.linear.bias(),
        }
    }

    /// The prefix of the `VarBuilder` that the layer was built from, if it was.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The layer's adapters, be they merged or not.
    pub fn lora(&self) -> Option<&LinearLoRA> {
        self.adapted().filter(|lora| !lora.loras().is_empty())
    }

    /// The layer's adapters, to change their modes.
    pub fn lora_mut(&mut self) -> Option<&mut LinearLoRA> {
        self.adapted_mut().filter(|lora| !lora.loras().is_empty())
    }

    /// Whether adapters are in the weight.
    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Merged(_))
    }

    /// What the layer has of adapters, which may be no more than parameters of its own.
    pub(crate) fn adapted(&self) -> Option<&LinearLoRA> {
        match &self.state {
            State::Plain(_) => None,
            State::Adapted(lora) => Some(lora),
            State::Merged(merged) => Some(&merged.lora),
        }
    }

    pub(crate) fn adapted_mut(&mut self) -> Option<&mut LinearLoRA> {
        match &mut self.state {
            State::Plain(_) => None,
            State::Adapted(lora) => Some(lora),
            State::Merged(merged) => Some(&mut merged.lora),
        }
    }

    /// The adapters that are in the weight.
    pub(crate) fn merged_picks(&self) -> Option<&[Pick]> {
        match &self.state {
            State::Merged(merged) => Some(&merged.picks),
            _ => None,
        }
    }

    /// The adapted layer, if it can share its input's passes with others.
    pub(super) fn sharing(&self, xs: &Tensor) -> Result<Option<Sharing<'_>>> {
        match &self.state {
            State::Adapted(lora) => lora.sharing(xs),
            _ => Ok(None),
        }
    }

    /// Puts `lora` in the place of whatever the layer was.
    pub(crate) fn adapt(&mut self, lora: LinearLoRA) {
        self.state = State::Adapted(Box::new(lora));
    }

    /// Adds what an adapter has for this layer, at `path`. A merged layer stays what it is.
    pub(crate) fn attach(
        &mut self,
        path: &str,
        switch: &Arc<Switch>,
        adapter: Option<LoraAdapter>,
        trained: Option<Trained>,
    ) {
        if let State::Plain(linear) = &self.state {
            let (weight, bias) = (linear.weight().clone(), linear.bias().cloned());
            self.adapt(LinearLoRA::bare(path, weight, bias, switch));
        }
        if let State::Adapted(lora) = &mut self.state {
            lora.attach(adapter, trained);
        }
    }

    /// Puts `linear` to work, which has `picks` in its weight. A plain layer stays what it is.
    pub(crate) fn set_merged(&mut self, linear: candle_nn::Linear, picks: &[Pick]) {
        if let Some(lora) = self.adapted() {
            self.state = State::Merged(Box::new(Merged {
                linear,
                picks: picks.to_vec(),
                _counted: MergedLayer::new(lora.switch()),
                lora: lora.clone(),
            }));
        }
    }

    /// Adds the active adapters to a copy of the weight; they and the weight are kept. Does
    /// nothing if the layer is plain or merged.
    ///
    /// # Errors
    /// Those of the product; if a number of the result is not finite; if adapters are selected row
    /// by row. The layer is then unchanged.
    pub fn merge(&mut self) -> crate::Result<()> {
        if let State::Adapted(lora) = &self.state {
            let picks = lora.active()?;
            let merged = lora.merged(&picks)?;
            self.set_merged(merged, &picks);
        }
        Ok(())
    }

    /// Goes back to the weight before [`merge`](Self::merge), bit for bit. Does nothing if the
    /// layer is not merged.
    pub fn unmerge(&mut self) {
        if let State::Merged(merged) = &self.state {
            self.state = State::Adapted(Box::new(merged.lora.clone()));
        }
    }

    /// Makes a merged layer a plain one of the merged weight.
    pub(crate) fn unload(&mut self) {
        if let State::Merged(merged) = &self.state {
            self.state = State::Plain(merged.linear.clone());
        }
    }

    /// Takes the adapters off: the layer is as it was before it was adapted.
    pub fn remove_adapter(&mut self) -> Option<LinearLoRA> {
        let lora = self.adapted()?.clone();
        let base = candle_nn::Linear::new(lora.weight().clone(), lora.bias().cloned());
        self.state = State::Plain(base);
        (!lora.loras().is_empty()).then_some(lora)
    }

    /// Drops what an adapter has here; without another, the layer is plain again.
    pub(crate) fn detach(&mut self, id: AdapterId) {
        if let Some(lora) = self.adapted_mut() {
            lora.detach(id);
            if lora.is_bare() {
                self.remove_adapter();
            }
        }
    }

    /// Makes the layer listen to another switch, on which some adapters have other ids.
    pub(crate) fn join(&mut self, switch: &Arc<Switch>, ids: &HashMap<AdapterId, AdapterId>) {
        if let Some(lora) = self.adapted_mut() {
            lora.join(switch, ids);
        }
        if let State::Merged(merged) = &mut self.state {
            merged._counted = MergedLayer::new(switch);
            for pick in &mut merged.picks {
                pick.id = ids.get(&pick.id).copied().unwrap_or(pick.id);
            }
        }
    }

    /// Replaces weight and bias of a plain layer by what `freeze` makes of them.
    pub(crate) fn freeze(&mut self, mut freeze: impl FnMut(&Tensor) -> Tensor) {
        if let State::Plain(linear) = &self.state {
            let weight = freeze(linear.weight());
            let bias = linear.bias().map(freeze);
            self.state = State::Plain(candle_nn::Linear::new(weight, bias));
        }
    }
}

impl Merged {
    /// Whether the merged weight is what the calling thread computes with, or the base's.
    fn acts(&self) -> Result<bool> {
        Ok(self.lora.is_enabled() && self.lora.switch().acts_merged()?)
    }
}

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let linear = match &self.state {
            State::Adapted(lora) => return lora.forward(xs),
            State::Merged(merged) if !merged.acts()? => return merged.lora.forward_base(xs),
            State::Merged(merged) => &merged.linear,
            State::Plain(linear) => linear,
        };
        let trained =
            linear.weight().track_op() || linear.bias().is_some_and(|bias| bias.track_op());
        if trained || !xs.track_op() || linear.weight().rank() != 2 {
            return linear.forward(xs);
        }
        let frozen = FrozenLinear::new(linear.weight().clone(), linear.bias().cloned());
        over_rows(xs, linear.weight().dim(0)?, |xs| frozen.apply(xs))
    }
}

/// A layer with the `weight` and `bias` of `vb`, as `candle_nn::linear`.
///
/// # Errors
/// If `vb` has no such tensors.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, true, vb)
}

/// A layer with the `weight` of `vb`, as `candle_nn::linear_no_bias`.
///
/// # Errors
/// If `vb` has no such tensor.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, false, vb)
}

/// A layer with the `weight` of `vb`, and its `bias` if asked for, as `candle_nn::linear_b`.
///
/// # Errors
/// If `vb` has no such tensors.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    let prefix = vb.prefix();
    Ok(Linear {
        state: State::Plain(candle_nn::linear_b(in_dim, out_dim, bias, vb)?),
        path: (!prefix.is_empty()).then(|| prefix.into()),
    })
}
