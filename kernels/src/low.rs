//! The rank-sized factor of the Hopper kernel: given, or made by the launch.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

use crate::dropout::Mask;
use crate::element::Element;
use crate::error::Result;
use crate::gemm::Product;
use crate::hopper::TILE;
use crate::launch::Launcher;
use crate::rows::{Rows, padded_width};
use crate::shares::Shares;
use crate::tensor_map::TensorMap;

/// The rank-sized factor `q [rows, padded_rank]` of the adapter's part.
pub(crate) enum Low<'a, T> {
    Given(&'a Rows<'a, T>),
    Made(Made<'a, T>),
}

/// `into = scale · D(input) downᵀ`, made by the tiles that are the first to read the input; at most
/// [`MOST_MADE`](crate::making::MOST_MADE) ranks.
pub(crate) struct Made<'a, T> {
    /// `[padded_rank, padded depth]`
    pub down: &'a CudaView<'a, T>,
    pub ranks: usize,
    pub scale: f32,
    /// `[rows, padded_rank]`
    pub into: &'a mut CudaSlice<T>,
    /// Of the input; forward.
    pub mask: Option<Mask>,
}

impl<T> Low<'_, T> {
    pub fn ranks(&self) -> usize {
        match self {
            Self::Given(q) => q.cols,
            Self::Made(made) => made.ranks,
        }
    }

    /// The `DOWN` option of the kernel.
    pub fn define(&self) -> u32 {
        match self {
            Self::Given(_) => 0,
            Self::Made(Made { mask: None, .. }) => 1,
            Self::Made(_) => 2,
        }
    }
}

/// Tiles of a launch, as clusters take them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    pub product: Product,
    pub rows: usize,
    pub cols: usize,
    /// Clusters with tiles.
    pub busy: usize,
    /// Blocks without.
    pub spare: usize,
}

/// The rank-sized product as arguments of the kernel.
pub(crate) struct LowArg<'a> {
    pub down: DownArg,
    pub down_map: Option<TensorMap>,
    /// Of the input.
    pub mask: Option<Mask>,
    pub q_at: u64,
    pub q_stride: usize,
    _partial: Option<CudaSlice<f32>>,
    _guards: (SyncOnDrop<'a>, Option<SyncOnDrop<'a>>),
}

impl Launcher<'_> {
    /// `q` for a launch over `[rows, depth]`.
    pub fn low<'a, T: Element>(
        &'a self,
        q: Low<'a, T>,
        depth: usize,
        tiling: Tiling,
    ) -> Result<LowArg<'a>> {
        let Made {
            down,
            ranks,
            scale,
            into,
            mask,
        } = match q {
            Low::Given(q) => {
                let (q_at, guard) = q.data.device_ptr(self.stream);
                return Ok(LowArg {
                    down: DownArg::default(),
                    down_map: None,
                    mask: None,
                    q_at,
                    q_stride: q.stride,
                    _partial: None,
                    _guards: (guard, None),
                });
            }
            Low::Made(made) => made,
        };
        let shares = Shares::new(tiling, depth);
        let len = shares.count * tiling.rows * TILE * ranks;
        let partial = self.alloc::<f32>("partial rank-sized products", len)?;
        let partial_at = partial.device_ptr(self.stream).0;
        let (down_at, down_guard) = down.device_ptr(self.stream);
        let width = padded_width(depth);
        let down_map = TensorMap::new::<T>(down_at, (ranks, depth, width), ranks)?;
        let (q_at, guard) = into.device_ptr_mut(self.stream);
        Ok(LowArg {
            down: DownArg {
                q: q_at,
                partial: partial_at,
                shares: shares.count as i32,
                window: shares.window as i32,
                early: shares.early as i32,
                delay: shares.delay as i32,
                at_once: shares.at_once as i32,
                stride: shares.stride as i32,
                scale,
                padding: 0,
            },
            down_map: Some(down_map),
            mask,
            q_at,
            q_stride: ranks,
            _partial: Some(partial),
            _guards: (guard, Some(down_guard)),
        })
    }
}

/// What makes `q`, laid out as in down.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct DownArg {
    pub q: u64,
    pub partial: u64,
    pub shares: i32,
    pub window: i32,
    pub early: i32,
    pub delay: i32,
    pub at_once: i32,
    pub stride: i32,
    pub scale: f32,
    pub padding: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Down`.
unsafe impl DeviceRepr for DownArg {}
