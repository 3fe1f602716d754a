//! Types that a model can't have if it is to be adapted, and the errors that say so.
//!
//! Each "implements" [`LoraTargets`] under a bound that it does not meet: the compiler then reports
//! the bound, in the words written here. The bound is on a reference to the type, since the
//! compiler would report an unmet bound on the type itself as the missing `LoraTargets`; and on one
//! of any lifetime, since a bound without parameters is an error where it is written.

use std::sync::Arc;

use crate::{LoraTargets, ModulePath, Result, TargetTree, Visitor, nn};

#[diagnostic::on_unimplemented(
    message = "`candle_nn::Linear` can't be adapted",
    label = "use `lora_core::nn::Linear`"
)]
pub trait Adaptable {}
impl Adaptable for nn::Linear {}

#[diagnostic::on_unimplemented(
    message = "the forward pass of `candle_nn::RmsNorm` silently cuts the gradient",
    label = "use `lora_core::nn::RmsNorm`"
)]
pub trait RmsNormWithGradient {}
impl RmsNormWithGradient for nn::RmsNorm {}

#[diagnostic::on_unimplemented(
    message = "the forward pass of `candle_nn::LayerNorm` silently cuts the gradient",
    label = "use `lora_core::nn::LayerNorm`"
)]
pub trait LayerNormWithGradient {}
impl LayerNormWithGradient for nn::LayerNorm {}

#[diagnostic::on_unimplemented(
    message = "what is behind an `Arc` is shared and can't be adapted",
    label = "own it, or mark the field `#[lora(skip)]`"
)]
pub trait Owned {}
impl Owned for nn::Linear {}

macro_rules! refused {
    ($($(for<$T:ident>)? ($ty:ty): $bound:ident;)*) => {$(
        impl $(<$T: ?Sized>)? LoraTargets for $ty
        where
            for<'a> &'a $ty: $bound,
        {
            const TARGETS: TargetTree = TargetTree::Empty;

            fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
                Ok(())
            }
        }
    )*};
}

refused! {
    (candle_nn::Linear): Adaptable;
    (candle_nn::RmsNorm): RmsNormWithGradient;
    (candle_nn::LayerNorm): LayerNormWithGradient;
    for<T> (Arc<T>): Owned;
}
