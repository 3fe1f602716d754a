//! Types without linear layers, of which a model is made too.

use std::marker::PhantomData;

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};

use crate::{LoraTargets, ModulePath, Result, TargetTree, Visitor};

/// Types that hold nothing to adapt and nothing to freeze.
macro_rules! leaves {
    ($($leaf:ty),* $(,)?) => {$(
        // Keeps the list of "other types that implement `LoraTargets`" in errors to those that help.
        #[diagnostic::do_not_recommend]
        impl LoraTargets for $leaf {
            const TARGETS: TargetTree = TargetTree::Empty;

            fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
                Ok(())
            }
        }
    )*};
}

leaves!(
    (),
    bool,
    char,
    u8,
    u16,
    u32,
    u64,
    u128,
    usize,
    i8,
    i16,
    i32,
    i64,
    i128,
    isize,
    f16,
    bf16,
    f32,
    f64,
    String,
    &str,
    Tensor,
    Device,
    DType,
    Shape,
    candle_nn::Activation,
    candle_nn::Dropout,
    candle_nn::ops::Identity,
    // candle_transformers keeps one in most layers.
    tracing::Span,
);

// Layers of `candle_nn` with a true backward pass that LoRA does not adapt.
leaves!(
    candle_nn::Conv1d,
    candle_nn::Conv2d,
    candle_nn::ConvTranspose1d,
    candle_nn::ConvTranspose2d,
    candle_nn::GroupNorm,
    candle_nn::PReLU,
);

/// candle's embedding has a true backward pass: it is frozen like the drop-in, and not adapted.
impl LoraTargets for candle_nn::Embedding {
    const TARGETS: TargetTree = TargetTree::Empty;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        let mut weight = self.embeddings().clone();
        visitor.parameter(path, "weight", &mut weight)?;
        *self = Self::new(weight, self.hidden_size());
        Ok(())
    }
}

impl<T: ?Sized> LoraTargets for PhantomData<T> {
    const TARGETS: TargetTree = TargetTree::Empty;

    fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
        Ok(())
    }
}
