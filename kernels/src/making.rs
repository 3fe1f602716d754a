//! The rank-sized product made by the first tiles of the Hopper kernel, and where that pays.

use cudarc::driver::{CudaSlice, CudaView, DeviceRepr};

use crate::hopper::{CLUSTER, TILE};
use crate::launch::Launcher;
use crate::path::Preference;
use crate::rows::Rows;
use crate::side::{beside, busy};
use crate::sweep;

/// Most ranks that a launch can make the rank-sized product of, or gradients of the adapter beside.
pub(crate) const MOST_MADE: usize = 64;

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
pub(crate) const PACKING_STEPS: usize = 4;
/// Steps of the depth that the exchange of the shares takes, about 5 µs.
const EXCHANGE_STEPS: usize = 8;

/// The rank-sized factor `q [rows, padded_rank]` of the adapter's part.
pub(crate) enum Low<'a, T> {
    Given(&'a Rows<'a, T>),
    Made(Made<'a, T>),
}

/// `into = scale · input downᵀ`, made by the launch that reads the input; at most [`MOST_MADE`] ranks.
pub(crate) struct Made<'a, T> {
    /// `[padded_rank, padded depth]`
    pub down: &'a CudaView<'a, T>,
    pub ranks: usize,
    pub scale: f32,
    /// `[rows, padded_rank]`
    pub into: &'a mut CudaSlice<T>,
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

/// How the first tiles share the depth of the rank-sized product, as in down.cuh.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shares {
    pub count: usize,
    pub window: usize,
    pub delay: usize,
}

/// As many shares as the clusters make in their first tiles; each begins `delay` steps before its own.
pub(crate) fn shares(
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
