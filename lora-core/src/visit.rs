//! What a traversal of a model meets.

use candle_core::Tensor;

use crate::{ModulePath, Result, nn::Linear};

/// Something to do at each linear layer of a model, and at each of its other parameters.
///
/// Every verb of [`LoraTargets`](crate::LoraTargets) is one of these over the traversal that the
/// derive writes.
pub trait Visitor {
    /// Is called for every linear layer, in declaration order.
    ///
    /// # Errors
    /// An error ends the traversal.
    fn linear(&mut self, path: &ModulePath, linear: &mut Linear) -> Result<()>;

    /// Is called for every other parameter of a drop-in layer, such as the scale of a norm.
    /// `name` is the parameter's name in its layer: `weight` or `bias`.
    ///
    /// # Errors
    /// An error ends the traversal.
    fn parameter(&mut self, path: &ModulePath, name: &str, tensor: &mut Tensor) -> Result<()> {
        let _ = (path, name, tensor);
        Ok(())
    }
}
