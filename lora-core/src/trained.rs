//! Parameters of a linear layer itself that an adapter trains: PEFT's `modules_to_save` and `bias`.

use candle_core::{Tensor, Var};

use crate::switch::AdapterId;

/// A copy of the parameters, which acts in their place where the adapter is selected.
#[derive(Clone, Debug)]
pub(crate) struct Trained {
    pub id: AdapterId,
    /// `[out, in]`; `None` if the bias alone is trained.
    pub weight: Option<Var>,
    /// `[out]`.
    pub bias: Option<Var>,
}

impl Trained {
    /// The tensors to train, with their names in the layer.
    pub fn vars(&self) -> impl Iterator<Item = (&'static str, &Var)> {
        let named = [("weight", &self.weight), ("bias", &self.bias)];
        named
            .into_iter()
            .filter_map(|(name, var)| Some((name, var.as_ref()?)))
    }

    /// `xs Wᵀ + b` with the trained weight, if it is trained, for `xs [tokens, in]`.
    pub fn forward(&self, xs: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Some(weight) = &self.weight else {
            return Ok(None);
        };
        let ys = xs.matmul(&weight.to_dtype(xs.dtype())?.t()?)?;
        self.add_bias(ys).map(Some)
    }

    /// `ys + b`
    pub fn add_bias(&self, ys: Tensor) -> candle_core::Result<Tensor> {
        match &self.bias {
            Some(bias) => ys.broadcast_add(&bias.to_dtype(ys.dtype())?),
            None => Ok(ys),
        }
    }
}
