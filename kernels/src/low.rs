//! The rank-sized factor of the Hopper kernel: given, or made by the launch.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

use crate::dropout::Mask;
use crate::element::Element;
use crate::error::Result;
use crate::gemm::Product;
use crate::hopper::{DEPTH, TILE};
use crate::launch::Launcher;
use crate::path::Preference;
use crate::rows::{Rows, padded_width};
use crate::shares::{PACKING_STEPS, shares};
use crate::skinny::{RowsMut, Scales};
use crate::spare;
use crate::tensor_map::TensorMap;

/// The rank-sized factor `q [rows, padded_rank]` of the adapter's part.
pub(crate) enum Low<'a, T> {
    Given(&'a Rows<'a, T>),
    Made(Made<'a, T>),
}

/// `into = scale · D(input) downᵀ`, made by the launch that reads the input; at most
/// [`MOST_MADE`](crate::making::MOST_MADE) ranks, or [`spare::MOST`].
pub(crate) struct Made<'a, T> {
    /// `[padded_rank, padded depth]`
    pub down: &'a CudaView<'a, T>,
    pub ranks: usize,
    pub scale: f32,
    /// `[rows, padded_rank]`
    pub into: &'a mut CudaSlice<T>,
    pub by: Maker,
}

/// Who makes the rank-sized product.
#[derive(Clone, Copy)]
pub(crate) enum Maker {
    /// The first tiles, from the input that they read anyway; without a mask.
    FirstTiles,
    /// A pass before the product, and the clusters that have no tiles the rows that no tile needs soon; of at
    /// most [`spare::MOST`] ranks.
    SpareClusters(Mask),
}

impl<T> Low<'_, T> {
    pub fn ranks(&self) -> usize {
        match self {
            Self::Given(q) => q.cols,
            Self::Made(made) => made.ranks,
        }
    }

    pub fn maker(&self) -> Option<Maker> {
        match self {
            Self::Given(_) => None,
            Self::Made(made) => Some(made.by),
        }
    }
}

impl Maker {
    /// The `DOWN` option of the kernel, which is 0 without a maker.
    pub fn define(self) -> u32 {
        match self {
            Self::FirstTiles => 1,
            Self::SpareClusters(_) => 2,
        }
    }
}

/// Tiles of a launch, as clusters take them.
#[derive(Clone, Copy)]
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
    /// The input in boxes for [`Maker::SpareClusters`], with its mask.
    pub input_map: Option<TensorMap>,
    pub mask: Option<Mask>,
    pub q_at: u64,
    pub q_stride: usize,
    /// Whether blocks wait for others that make it.
    pub awaited: bool,
    _partial: Option<CudaSlice<f32>>,
    _guards: (SyncOnDrop<'a>, Option<SyncOnDrop<'a>>),
}

impl Launcher<'_> {
    /// `q` for a launch over `input`, of which [`Maker::SpareClusters`] has the first rows made here.
    pub fn low<'a, T: Element>(
        &'a self,
        q: Low<'a, T>,
        input: &Rows<T>,
        depth: usize,
        tiling: Tiling,
    ) -> Result<LowArg<'a>> {
        let Made {
            down,
            ranks,
            scale,
            into,
            by,
        } = match q {
            Low::Given(q) => {
                let (q_at, guard) = q.data.device_ptr(self.stream);
                return Ok(LowArg {
                    down: DownArg {
                        q: q_at,
                        ..DownArg::default()
                    },
                    down_map: None,
                    input_map: None,
                    mask: None,
                    q_at,
                    q_stride: q.stride,
                    awaited: false,
                    _partial: None,
                    _guards: (guard, None),
                });
            }
            Low::Made(made) => made,
        };
        let rows = input.rows;
        let mut arg = DownArg {
            scale,
            ..DownArg::default()
        };
        let (mut partial, mut input_map, mut mask) = (None, None, None);
        match by {
            Maker::FirstTiles => {
                let shares = shares(
                    tiling.busy,
                    (tiling.rows, tiling.cols),
                    depth.div_ceil(DEPTH),
                    rows * depth * size_of::<T>(),
                    match tiling.product {
                        Product::Forward => PACKING_STEPS,
                        Product::Backward => 0,
                    },
                );
                arg.shares = shares.count as i32;
                arg.window = shares.window as i32;
                arg.delay = shares.delay as i32;
                if shares.count > 1 {
                    let len = shares.count * tiling.rows * TILE * ranks;
                    let part = self.alloc::<f32>("partial rank-sized products", len)?;
                    arg.partial = part.device_ptr(self.stream).0;
                    partial = Some(part);
                }
            }
            Maker::SpareClusters(drawn) => {
                let first = match self.kernels.preference() {
                    // Small layers take this way too: half for the pass, half for the clusters.
                    Preference::Hopper if tiling.spare > 0 => (rows / 2).next_multiple_of(128),
                    _ => spare::first_row((rows, depth), ranks, tiling),
                };
                let first = first.min(rows);
                let mut before = RowsMut {
                    data: into.as_view_mut(),
                    cols: ranks,
                    stride: ranks,
                };
                let input = Rows {
                    data: input.data.slice(..),
                    rows: first,
                    ..*input
                };
                let scales = Scales::all(scale);
                self.shrink(&input, down, &scales, Some(drawn), (&mut before, true))?;
                let (input_at, _input) = input.data.device_ptr(self.stream);
                let size = (rows, depth, input.stride);
                input_map = Some(TensorMap::new::<T>(input_at, size, spare::ROWS)?);
                mask = Some(drawn);
                arg.first_row = first as i32;
            }
        }
        let (down_at, down_guard) = down.device_ptr(self.stream);
        let width = padded_width(depth);
        let down_map = TensorMap::new::<T>(down_at, (ranks, depth, width), ranks)?;
        let (q_at, guard) = into.device_ptr_mut(self.stream);
        arg.q = q_at;
        Ok(LowArg {
            down: arg,
            down_map: Some(down_map),
            input_map,
            mask,
            q_at,
            q_stride: ranks,
            awaited: match by {
                Maker::FirstTiles => true,
                Maker::SpareClusters(_) => (arg.first_row as usize) < rows,
            },
            _partial: partial,
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
    pub delay: i32,
    pub scale: f32,
    pub first_row: i32,
    pub padding: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Down`.
unsafe impl DeviceRepr for DownArg {}
