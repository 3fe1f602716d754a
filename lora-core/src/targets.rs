//! The trait that says where a model can be adapted.

use std::{
    collections::{BTreeMap, HashMap},
    marker::PhantomData,
    sync::Arc,
};

use candle_core::{DType, Device, Shape, Tensor};

use crate::{
    ModulePath, Result,
    nn::{Embedding, LayerNorm, Linear, RmsNorm},
    tree::{Field, TargetTree},
    visit::Visitor,
};

/// A model, or a part of one, whose linear layers can be adapted.
///
/// Derive it. The derive writes the constant [`TARGETS`](Self::TARGETS) and the traversal
/// [`patch_linear`](Self::patch_linear); everything else is written once, here, over these two.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say what in it can be adapted",
    label = "nothing is known about LoRA here",
    note = "derive `LoraTargets` for `{Self}`, or mark the field `#[lora(skip)]` if nothing in it is to be adapted",
    note = "layers of `candle_nn` have drop-ins of the same name in `lora_core::nn`"
)]
pub trait LoraTargets {
    /// The linear layers that a value of this type can have.
    const TARGETS: TargetTree;

    /// Calls `visitor` at every linear layer and every parameter, with its path.
    ///
    /// # Errors
    /// The first error of the visitor ends the traversal.
    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()>;
}

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

layers_without_targets!(Embedding, LayerNorm, RmsNorm);

/// Types that hold nothing to adapt and nothing to freeze.
macro_rules! leaves {
    ($($leaf:ty),* $(,)?) => {$(
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
    f32,
    f64,
    String,
    &'static str,
    Tensor,
    Device,
    DType,
    Shape,
    candle_nn::Activation,
    candle_nn::Dropout,
    candle_nn::ops::Identity,
);

impl<T: ?Sized> LoraTargets for PhantomData<T> {
    const TARGETS: TargetTree = TargetTree::Empty;

    fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
        Ok(())
    }
}

impl<T: LoraTargets + ?Sized> LoraTargets for Box<T> {
    const TARGETS: TargetTree = T::TARGETS;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        (**self).patch_linear(path, visitor)
    }
}

impl<T: LoraTargets> LoraTargets for Option<T> {
    const TARGETS: TargetTree = T::TARGETS;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        self.iter_mut()
            .try_for_each(|value| value.patch_linear(path, visitor))
    }
}

impl<T: LoraTargets> LoraTargets for [T] {
    const TARGETS: TargetTree = TargetTree::Each(&T::TARGETS);

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        for (index, value) in self.iter_mut().enumerate() {
            path.enter(&index.to_string(), |path| value.patch_linear(path, visitor))?;
        }
        Ok(())
    }
}

impl<T: LoraTargets> LoraTargets for Vec<T> {
    const TARGETS: TargetTree = <[T]>::TARGETS;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        self.as_mut_slice().patch_linear(path, visitor)
    }
}

impl<T: LoraTargets, const N: usize> LoraTargets for [T; N] {
    const TARGETS: TargetTree = <[T]>::TARGETS;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        self.as_mut_slice().patch_linear(path, visitor)
    }
}

impl<T: LoraTargets> LoraTargets for BTreeMap<String, T> {
    const TARGETS: TargetTree = TargetTree::Keyed(&T::TARGETS);

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        for (key, value) in self {
            path.enter(key, |path| value.patch_linear(path, visitor))?;
        }
        Ok(())
    }
}

impl<T: LoraTargets, S> LoraTargets for HashMap<String, T, S> {
    const TARGETS: TargetTree = TargetTree::Keyed(&T::TARGETS);

    /// Visits in the order of the keys, so that nothing depends on the hash.
    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        let mut entries: Vec<_> = self.iter_mut().collect();
        entries.sort_by_key(|(key, _)| *key);
        for (key, value) in entries {
            path.enter(key, |path| value.patch_linear(path, visitor))?;
        }
        Ok(())
    }
}

/// Tuples name their parts by position, as a tuple struct does.
macro_rules! tuples {
    ($($($T:ident $index:tt),+;)*) => {$(
        impl<$($T: LoraTargets),+> LoraTargets for ($($T,)+) {
            const TARGETS: TargetTree = TargetTree::Fields(&[
                $(Field { name: stringify!($index), head: false, tree: &$T::TARGETS }),+
            ]);

            fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
                $(path.enter(stringify!($index), |path| self.$index.patch_linear(path, visitor))?;)+
                Ok(())
            }
        }
    )*};
}

tuples! {
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
    A 0, B 1, C 2, D 3, E 4;
    A 0, B 1, C 2, D 3, E 4, F 5;
}

/// A shared value can't be visited mutably, so nothing in it may need to be.
impl<T: LoraTargets> LoraTargets for Arc<T> {
    const TARGETS: TargetTree = {
        assert!(
            matches!(T::TARGETS, TargetTree::Empty),
            "linear layers behind an `Arc` can't be adapted: own them, or skip the field",
        );
        TargetTree::Empty
    };

    fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
        Ok(())
    }
}

/// Turns a layer of `candle_nn` away, with the name of the layer to use instead.
macro_rules! turned_away {
    ($($layer:ty, $guard:ident, $reason:literal;)*) => {$(
        #[diagnostic::on_unimplemented(message = $reason, label = $reason)]
        pub trait $guard<'a> {}

        impl LoraTargets for $layer
        where
            for<'a> $layer: $guard<'a>,
        {
            const TARGETS: TargetTree = TargetTree::Empty;

            fn patch_linear(&mut self, _: &mut ModulePath, _: &mut dyn Visitor) -> Result<()> {
                Ok(())
            }
        }
    )*};
}

mod candle_layers {
    use super::*;

    turned_away! {
        candle_nn::Linear, UseLinear,
            "`candle_nn::Linear` can't be adapted; use `lora_core::nn::Linear`";
        candle_nn::Embedding, UseEmbedding,
            "`candle_nn::Embedding` can't be frozen with the model; use `lora_core::nn::Embedding`";
        candle_nn::RmsNorm, UseRmsNorm,
            "the forward pass of `candle_nn::RmsNorm` silently cuts the gradient; use `lora_core::nn::RmsNorm`";
        candle_nn::LayerNorm, UseLayerNorm,
            "the forward pass of `candle_nn::LayerNorm` silently cuts the gradient; use `lora_core::nn::LayerNorm`";
    }
}
