//! The linear layer that can carry an adapter.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use crate::{LinearLoRA, linear_lora::over_rows, op::FrozenLinear};

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
    /// The layer with the adapter in its weight, and what it was before.
    Merged(candle_nn::Linear, Box<LinearLoRA>),
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
            State::Plain(linear) | State::Merged(linear, _) => linear.weight(),
            State::Adapted(lora) => lora.weight(),
        }
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        match &self.state {
            State::Plain(linear) | State::Merged(linear, _) => linear.bias(),
            State::Adapted(lora) => lora.bias(),
        }
    }

    /// The prefix of the `VarBuilder` that the layer was built from, if it was.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The adapter, be it merged or not.
    pub fn lora(&self) -> Option<&LinearLoRA> {
        match &self.state {
            State::Plain(_) => None,
            State::Adapted(lora) | State::Merged(_, lora) => Some(lora),
        }
    }

    /// The adapter, to change its modes.
    pub fn lora_mut(&mut self) -> Option<&mut LinearLoRA> {
        match &mut self.state {
            State::Plain(_) => None,
            State::Adapted(lora) | State::Merged(_, lora) => Some(lora),
        }
    }

    /// Whether the adapter is in the weight.
    pub fn is_merged(&self) -> bool {
        matches!(self.state, State::Merged(..))
    }

    /// The adapted layer, if it can share its input's passes with others.
    pub(super) fn sharing(&self) -> Option<&LinearLoRA> {
        match &self.state {
            State::Adapted(lora) if lora.can_share() => Some(lora),
            _ => None,
        }
    }

    /// Puts `lora` in the place of whatever the layer was.
    pub(crate) fn adapt(&mut self, lora: LinearLoRA) {
        self.state = State::Adapted(Box::new(lora));
    }

    /// Adds the adapter to a copy of the weight; the adapter and the weight are kept. Does nothing
    /// if the layer is plain or merged.
    ///
    /// # Errors
    /// Those of the product; the layer is then unchanged.
    pub fn merge(&mut self) -> crate::Result<()> {
        if let State::Adapted(lora) = &self.state {
            let merged = candle_nn::Linear::new(lora.merged_weight()?, lora.bias().cloned());
            self.state = State::Merged(merged, lora.clone());
        }
        Ok(())
    }

    /// Goes back to the weight before [`merge`](Self::merge), bit for bit. Does nothing if the
    /// layer is not merged.
    pub fn unmerge(&mut self) {
        if let State::Merged(_, lora) = &self.state {
            self.state = State::Adapted(lora.clone());
        }
    }

    /// Takes the adapter off: the layer is as it was before it was adapted.
    pub fn remove_adapter(&mut self) -> Option<LinearLoRA> {
        let (State::Adapted(lora) | State::Merged(_, lora)) = &self.state else {
            return None;
        };
        let lora = (**lora).clone();
        let base = candle_nn::Linear::new(lora.weight().clone(), lora.bias().cloned());
        self.state = State::Plain(base);
        Some(lora)
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

impl Module for Linear {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let linear = match &self.state {
            State::Adapted(lora) => return lora.forward(xs),
            State::Plain(linear) | State::Merged(linear, _) => linear,
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
