//! What the fused CPU ops share: element types, slices of tensors, loops over rows.
//!
//! Every op works on contiguous rows, computes in f32 (f64 for f64) and is parallel over chunks of
//! rows. The chunks depend on the shape alone, so sums over rows come out the same on any number
//! of threads.

mod element;
mod exp;
mod matmul;
mod rows;

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};

pub(crate) use element::{Element, Real, dispatch_float};
pub(crate) use matmul::{BLOCK, Matrix, matmul_add};
pub(crate) use rows::{fold, fold2, fold3, map_row_pairs, map_rows, parallel_worthwhile};

/// Compiles `body` for the widest vector instructions of this CPU and runs it.
///
/// Give it a closure that is `#[inline(always)]`: one that is not inlined keeps the instructions of
/// the slowest CPU.
#[inline(always)]
pub(crate) fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// The elements of a contiguous storage.
pub(crate) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a fused op got a tensor that is not contiguous: {layout:?}")
    };
    let all = storage.as_slice::<T>()?;
    // An empty view may start beyond the end of an empty storage.
    Ok(if start == end { &[] } else { &all[start..end] })
}

/// A CPU tensor that is being read.
pub(crate) struct Reader<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// The elements of a contiguous tensor.
    pub(crate) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => bail!("a fused CPU op got a tensor of another device"),
        }
    }
}
