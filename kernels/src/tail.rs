//! The tiles of the Hopper kernel that are left after whole waves, as in tail.cuh.

use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

use crate::error::Result;
use crate::hopper::{CLUSTER, DEPTH, STEP_MICROS, TILE};
use crate::launch::Launcher;
use crate::low::Tiling;
use crate::path::Preference;
use crate::shares::Shares;

/// Warps of a cluster, and floats of the sums of one.
const WARPS: usize = CLUSTER * 8;
const SUMS: usize = TILE / WARPS * TILE;
/// Microseconds that the exchange of the sums is taken to need: a block writes and reads up to 128 KB. An estimate; the launch
/// for which it was written wins 25 to 30 of 36.
const EXCHANGE_MICROS: f64 = 6.0;

/// How the last tiles are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tail {
    /// The first of them.
    pub first: usize,
    /// Clusters that make parts of the depth of each.
    pub split: usize,
}

/// Words by which the warps of a launch of up to `clusters` clusters tell each other that sums are there.
pub(crate) fn words(clusters: usize) -> usize {
    clusters / 2 * WARPS
}

impl Tail {
    /// Of `tiles` tiles over a depth of `depth`: if several of the `clusters` have time for each that is left.
    pub fn new(tiles: usize, clusters: usize, depth: usize) -> Option<Self> {
        let left = tiles % clusters;
        let split = [4, 2].into_iter().find(|split| split * left <= clusters)?;
        (left > 0 && tiles > clusters && depth.div_ceil(DEPTH) >= split).then_some(Self {
            first: tiles - left,
            split,
        })
    }

    /// Microseconds that are won over a wave for whole tiles.
    pub fn saves(self, depth: usize) -> f64 {
        let wave = depth.div_ceil(DEPTH) as f64 * STEP_MICROS;
        wave * (1.0 - 1.0 / self.split as f64) - EXCHANGE_MICROS
    }
}

/// The tail as an argument of the kernel, with its memory.
#[derive(Default)]
pub(crate) struct TailLaunch {
    pub arg: TailArg,
    _sums: Option<CudaSlice<f32>>,
}

impl Launcher<'_> {
    /// The tail of a forward over `depth` that makes S, instead of the `whole` tiles.
    pub fn tail(&self, depth: usize, whole: Tiling) -> Option<Tail> {
        let clusters = whole.busy + whole.spare / CLUSTER;
        let tail = Tail::new(whole.rows * whole.cols, clusters, depth)?;
        // Small layers take this way too.
        let worth = self.kernels.preference() == Preference::Hopper || tail.saves(depth) > 0.0;
        // Those that make S are whole.
        let all = Tiling {
            busy: clusters,
            spare: 0,
            ..whole
        };
        let worth = worth && Shares::new(all, depth).end <= tail.first;
        worth.then_some(tail)
    }

    /// Room for the sums of `tail`, of a launch of `tiles` tiles.
    pub fn tail_launch(&self, tail: Option<Tail>, tiles: usize) -> Result<TailLaunch> {
        let Some(Tail { first, split }) = tail else {
            return Ok(TailLaunch::default());
        };
        let len = (tiles - first) * split * WARPS * SUMS;
        let sums = self.alloc::<f32>("partial sums of the output", len)?;
        let arg = TailArg {
            sums: sums.device_ptr(self.stream).0,
            first: first as i32,
            split: split as i32,
        };
        Ok(TailLaunch {
            arg,
            _sums: Some(sums),
        })
    }
}

/// Laid out as in tail.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TailArg {
    sums: u64,
    first: i32,
    split: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Tail`.
unsafe impl DeviceRepr for TailArg {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_that_are_left_are_cut_where_clusters_have_the_time() {
        let cut = |first, split| Some(Tail { first, split });
        // 8192 tokens, 4096 to 14336.
        assert_eq!(Tail::new(1792, 66, 4096), cut(1782, 4));
        // Twice as many for half of the depth each.
        assert_eq!(Tail::new(66 + 17, 66, 4096), cut(66, 2));
        // None left, too many, a single wave, a shallow one.
        for (tiles, depth) in [(132, 4096), (132 + 34, 4096), (16, 4096), (134, 128)] {
            assert_eq!(Tail::new(tiles, 66, depth), None, "{tiles} tiles");
        }
        for tiles in 1..500 {
            for clusters in [1, 2, 57, 66] {
                if let Some(Tail { first, split }) = Tail::new(tiles, clusters, 4096) {
                    assert!(first >= clusters && first.is_multiple_of(clusters));
                    assert!((tiles - first) * split <= clusters);
                    assert!((tiles - first) * WARPS <= words(clusters));
                }
            }
        }
    }
}
