//! Types that hold parts of a model, and the path segments that they add.

use std::collections::{BTreeMap, HashMap};

use crate::{Field, LoraTargets, ModulePath, Result, TargetTree, Visitor};

impl<T: LoraTargets + ?Sized> LoraTargets for Box<T> {
    const TARGETS: TargetTree = T::TARGETS;

    fn patch_linear(&mut self, path: &mut ModulePath, visitor: &mut dyn Visitor) -> Result<()> {
        (**self).patch_linear(path, visitor)
    }
}

#[diagnostic::do_not_recommend]
impl<T: LoraTargets + ?Sized> LoraTargets for &mut T {
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
        #[diagnostic::do_not_recommend]
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
