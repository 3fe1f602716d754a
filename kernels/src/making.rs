//! Where dS is better made by the first tiles of the Hopper kernel, and what of the gradient of A beside it.

use crate::element::Element;
use crate::hopper::{CLUSTER, TILE};
use crate::launch::Launcher;
use crate::path::Preference;
use crate::rows::Rows;
use crate::side::{self, CHUNK, Pace};

/// Most ranks that a launch can make the rank-sized product of, or gradients of the adapter beside.
pub(crate) const MOST_MADE: usize = 64;
/// The same for the tiles of a masked output, by the registers they have.
const MOST_MADE_MASKED: usize = 32;

/// Microseconds that making dS adds to a product. What it decides at 2048→2048, to sweep, was measured to be 15 µs faster on
/// an H100.
const MAKING: f64 = 12.0;
/// Microseconds until side work of all blocks is under way.
const SIDE_START: f64 = 8.0;
/// Microseconds of a pass besides the reading.
const SWEEP_START: f64 = 8.0;
/// Microseconds to draw the mask of a million elements: 8.5 for 8192x4096, measured on an H100.
const DRAWING: f64 = 0.25;

impl Launcher<'_> {
    /// Whether a cluster makes one tile of q at most. What several of them cost has not been measured.
    fn makes_at_once(&self, rows: usize) -> bool {
        rows.div_ceil(TILE) <= self.kernels.multiprocessors() / CLUSTER
    }

    /// Whether dS is better made by the product's first tiles, and both gradients of the adapter beside,
    /// than dS and the gradient of B in one pass over `dys` before; where masked, the bits of the mask of `xs` are drawn in
    /// a pass of their own, or by that one.
    pub fn makes_backward<T: Element>(&self, dys: &Rows<T>, xs: &Rows<T>, pace: Pace) -> bool {
        let Pace { ranks, masked } = pace;
        let most = if masked { MOST_MADE_MASKED } else { MOST_MADE };
        if self.kernels.preference() == Preference::Hopper {
            // Of those with a mask, some take the other way.
            return ranks <= most && !(masked && xs.cols > CHUNK);
        }
        let beside = self.beside(dys, xs.cols, pace);
        let rest = |width: usize| match width.saturating_sub(beside) {
            0 => 0.0,
            rest => SIDE_START + micros(xs.rows, rest),
        };
        let drawing = if masked {
            DRAWING * 1e-6 * xs.rows as f64 * xs.cols as f64
        } else {
            0.0
        };
        let reading = micros(xs.rows, dys.cols);
        let made = MAKING + drawing + rest(dys.cols + xs.cols);
        // The arithmetic units have time to draw for most of the reading.
        let drawn = (drawing - 0.7 * reading).max(0.0);
        let swept = SWEEP_START + reading + drawn + rest(xs.cols);
        // More than 32 ranks were measured to be faster in a pass that makes what is left of the gradient of A, and
        // slower in one that leaves it for after the tiles.
        let worth = if ranks > 32 {
            self.sweeps_from(dys, xs, pace).is_none()
        } else {
            made < swept || !self.sweeps(dys, ranks, true)
        };
        self.makes_at_once(xs.rows) && ranks <= most && worth
    }

    /// The column of `xs` from which on a pass over `dys` makes the gradient of A as well, so that what is before it can
    /// be made beside the product by the clusters without tiles; none where they make all of it, or the pass cannot.
    pub fn sweeps_from<T: Element>(
        &self,
        dys: &Rows<T>,
        xs: &Rows<T>,
        pace: Pace,
    ) -> Option<usize> {
        let wide = xs.cols;
        let first = if self.kernels.preference() == Preference::Hopper {
            // Small layers take this way too, if there is a chunk for each.
            (wide > CHUNK).then_some(wide / 2 / CHUNK * CHUNK)?
        } else {
            let beside = self.beside(dys, wide, pace);
            let idle = self.spare(xs.rows, wide) / CLUSTER;
            // As many chunks for each cluster.
            let step = CHUNK * idle.max(1);
            (beside < wide).then_some(beside / step * step)?
        };
        self.sweeps_next(dys, pace.ranks, xs, wide - first)
            .then_some(first)
    }

    /// Columns that the clusters without tiles read while the others make the gradient of the input.
    fn beside<T>(&self, dys: &Rows<T>, in_features: usize, pace: Pace) -> usize {
        let spare = self.spare(dys.rows, in_features);
        side::beside(spare, (dys.cols, in_features), pace)
    }

    /// Blocks without tiles.
    fn spare(&self, rows: usize, in_features: usize) -> usize {
        let tiles = rows.div_ceil(TILE) * in_features.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        CLUSTER * (clusters - side::busy(tiles, clusters).min(clusters))
    }
}

/// Microseconds to read a matrix of halves once, at 4 TB/s.
fn micros(rows: usize, cols: usize) -> f64 {
    2.0 * rows as f64 * cols as f64 / 4e6
}
