//! The layers of this crate.

use crate::{
    LoraTargets, ModulePath, Result, TargetTree, Visitor,
    nn::{Embedding, LayerNorm, Linear, RmsNorm, with_tracing},
};

impl LoraTargets for Linear {
    const TARGETS: TargetTree = TargetTree::Linear;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        visitor.linear(path, self)
    }
}

/// Layers whose parameters are frozen with the model and never adapted.
macro_rules! layers_without_targets {
    ($($layer:ty),* $(,)?) => {$(
        impl LoraTargets for $layer {
            const TARGETS: TargetTree = TargetTree::Empty;

            fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
                for (name, tensor) in self.params_mut() {
                    visitor.parameter(path, name, tensor)?;
                }
                Ok(())
            }
        }
    )*};
}

layers_without_targets!(Embedding, LayerNorm, RmsNorm, with_tracing::RmsNorm);
