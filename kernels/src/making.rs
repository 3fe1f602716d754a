//! The rank-sized product made by the first tiles of the Hopper kernel, and where that pays.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

use crate::dropout::Mask;
use crate::element::Element;
use crate::error::Result;
use crate::gemm::Product;
use crate::hopper::{CLUSTER, DEPTH, GROUP, TILE};
use crate::launch::Launcher;
use crate::path::Preference;
use crate::rows::{Rows, padded_width};
use crate::side::{beside, busy};
use crate::skinny::{RowsMut, Scales};
use crate::sweep;
use crate::tensor_map::TensorMap;

/// Most ranks that a launch can make the rank-sized product of, or gradients of the adapter beside.
pub(crate) const MOST_MADE: usize = 64;

/// Most ranks of [`Maker::SpareClusters`], by the shared memory they take.
pub(crate) const MOST_SPARE: usize = 32;

/// Rows of a unit of [`Maker::SpareClusters`], as in spare.cuh.
const SPARE_ROWS: usize = 64;
/// Elements of the input of which a block without tiles makes S in a microsecond, drawing the mask.
const SPARE_ELEMENTS: usize = 11_500;
/// Microseconds that a tile takes for 64 of the depth, beside others.
const STEP_MICROS: f64 = 0.7;

/// Microseconds that making S and dS adds to a product, measured on an H200; in backward with what it
/// takes until the side work of all blocks is under way.
const MAKING_FORWARD: f64 = 12.0;
const MAKING_BACKWARD: f64 = 20.0;
/// Microseconds of a pass besides the reading.
const SHRINK_START: f64 = 5.0;
const SWEEP_START: f64 = 8.0;

/// Tiles of a row that share the depth of its rank-sized product: more would exchange too much.
const MOST_SHARES: usize = 8;
/// Input that stays in the L2 cache, in bytes.
const CACHED: usize = 24 << 20;
/// Steps of the depth until the adapter is packed, about 3 µs.
const PACKING_STEPS: usize = 4;
/// Steps of the depth that the exchange of the shares takes, about 5 µs.
const EXCHANGE_STEPS: usize = 8;

/// The rank-sized factor `q [rows, padded_rank]` of the adapter's part.
pub(crate) enum Low<'a, T> {
    Given(&'a Rows<'a, T>),
    Made(Made<'a, T>),
}

/// `into = scale · D(input) downᵀ`, made by the launch that reads the input; at most [`MOST_MADE`] ranks.
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
    /// most [`MOST_SPARE`] ranks.
    SpareClusters(Mask),
}

impl Launcher<'_> {
    /// Whether S of `xs` costs less made by the product's first tiles than by a pass of its own.
    pub fn makes_forward<T>(&self, xs: &Rows<T>, ranks: usize) -> bool {
        if self.kernels.preference() == Preference::Hopper {
            return ranks <= MOST_MADE;
        }
        let pass = SHRINK_START + micros(xs.rows, xs.cols) * (ranks as f64 / 16.0).sqrt();
        self.makes_at_once(xs.rows) && ranks <= MOST_MADE && pass > MAKING_FORWARD
    }

    /// Whether a cluster makes one tile of q at most. What several of them cost has not been measured.
    fn makes_at_once(&self, rows: usize) -> bool {
        rows.div_ceil(TILE) <= self.kernels.multiprocessors() / CLUSTER
    }

    /// Whether dS is better made by the product's first tiles, and both gradients of the adapter beside,
    /// than dS and the gradient of B in one pass over `dys` before.
    pub fn makes_backward<T>(&self, dys: &Rows<T>, in_features: usize, ranks: usize) -> bool {
        if self.kernels.preference() == Preference::Hopper {
            return ranks <= MOST_MADE;
        }
        let (rows, out_features) = (dys.rows, dys.cols);
        let tiles = rows.div_ceil(TILE) * in_features.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let spare = CLUSTER * (clusters - busy(tiles, clusters).min(clusters));
        // Columns that the clusters without tiles read meanwhile; the rest waits for the tiles.
        let beside = beside(spare, out_features, in_features);
        let rest = |width: usize| micros(rows, width.saturating_sub(beside));
        let made = MAKING_BACKWARD + rest(out_features + in_features);
        let swept = SWEEP_START + micros(rows, out_features) + rest(in_features);
        self.makes_at_once(rows)
            && ranks <= MOST_MADE
            && (ranks > sweep::both(false) || made < swept)
    }
}

/// Microseconds to read a matrix of halves once, at 4 TB/s.
fn micros(rows: usize, cols: usize) -> f64 {
    2.0 * rows as f64 * cols as f64 / 4e6
}

/// The first row that the spare blocks can make before a tile awaits it, of an input `[rows, depth]`; whole
/// tiles of them.
fn first_spare_row((rows, depth): (usize, usize), tiling: Tiling) -> usize {
    let rows_per_micro = (tiling.spare * SPARE_ELEMENTS) as f64 / depth as f64;
    let tile_micros = depth.div_ceil(DEPTH) as f64 * STEP_MICROS;
    // Tiles are taken in groups of rows; a group awaits the rank at the end of its first tiles.
    let late = (0..tiling.rows.div_ceil(GROUP)).map(|group| {
        let wave = group * GROUP * tiling.cols / tiling.busy;
        let made = rows_per_micro * tile_micros * (wave + 1) as f64;
        rows.min((group + 1) * GROUP * TILE) as f64 - made
    });
    let first = late.fold(0.0, f64::max) as usize;
    first.next_multiple_of(128).min(rows)
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
                    Preference::Hopper if tiling.spare > 0 => (rows / 2).next_multiple_of(128),
                    _ => first_spare_row((rows, depth), tiling),
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
                input_map = Some(TensorMap::new::<T>(input_at, size, SPARE_ROWS)?);
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
            _partial: partial,
            _guards: (guard, Some(down_guard)),
        })
    }
}

/// How the first tiles share the depth of the rank-sized product, as in down.cuh.
#[derive(Debug, PartialEq, Eq)]
struct Shares {
    count: usize,
    window: usize,
    delay: usize,
}

/// As many shares as the clusters make in their first tiles; each begins `delay` steps before its own.
fn shares(
    clusters: usize,
    (rows, cols): (usize, usize),
    depth_blocks: usize,
    input_bytes: usize,
    delay: usize,
) -> Shares {
    let count = (clusters / rows)
        .min(cols)
        .min(depth_blocks)
        .clamp(1, MOST_SHARES);
    // A tile ends with windows that are not its own, which give the exchange time. Few windows interrupt
    // it least, but then tiles of a row read the input at different times, which has to stay in the cache.
    let most = if input_bytes <= CACHED {
        1
    } else {
        depth_blocks / count
    };
    for rounds in (1..=most).rev() {
        let window = depth_blocks.div_ceil(count * rounds);
        let before_last = (count * rounds - 1) * window;
        let idle =
            (count.saturating_sub(2) * window + depth_blocks).saturating_sub(before_last + delay);
        if count > 1 && before_last < depth_blocks && (idle >= EXCHANGE_STEPS || rounds == 1) {
            let delay = delay.min((count - 1) * window / 2);
            return Shares {
                count,
                window,
                delay,
            };
        }
    }
    Shares {
        count: 1,
        window: depth_blocks,
        delay: 0,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_depth_and_end_early() {
        for clusters in [57, 64, 66] {
            for rows in [1, 8, 31, 32, 33, 200] {
                for cols in [1, 2, 16] {
                    for depth_blocks in [1, 2, 9, 64, 224] {
                        for bytes in [1, 1 << 30] {
                            let found = shares(clusters, (rows, cols), depth_blocks, bytes, 4);
                            let Shares {
                                count,
                                window,
                                delay,
                            } = found;
                            assert!((1..=cols).contains(&count), "{found:?}");
                            assert!(count == 1 || count * rows <= clusters, "{found:?}");
                            // Every share has a window, and begins outside of its own.
                            assert!((count - 1) * window < depth_blocks, "{found:?}");
                            assert!(delay <= (count - 1) * window, "{found:?}");
                        }
                    }
                }
            }
        }
        let (count, window, delay) = (2, 16, 4);
        assert_eq!(
            shares(64, (32, 16), 64, 64 << 20, 4),
            Shares {
                count,
                window,
                delay
            }
        );
    }
}
