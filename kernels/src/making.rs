//! Where the rank-sized products are better made by the first tiles of the Hopper kernel.

use crate::element::Element;
use crate::hopper::{CLUSTER, TILE};
use crate::launch::Launcher;
use crate::path::Preference;
use crate::rows::Rows;
use crate::side::{beside, busy};

/// Most ranks that a launch can make the rank-sized product of, or gradients of the adapter beside.
pub(crate) const MOST_MADE: usize = 64;

/// Microseconds that making S and dS adds to a product, measured on an H200 with cooperative launches; in
/// backward with what it takes until the side work of all blocks is under way.
const MAKING_FORWARD: f64 = 12.0;
const MAKING_BACKWARD: f64 = 20.0;
/// Microseconds of a pass besides the reading.
const SHRINK_START: f64 = 5.0;
const SWEEP_START: f64 = 8.0;

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
    pub fn makes_backward<T: Element>(
        &self,
        dys: &Rows<T>,
        in_features: usize,
        ranks: usize,
    ) -> bool {
        if self.kernels.preference() == Preference::Hopper {
            return ranks <= MOST_MADE;
        }
        let (rows, out_features) = (dys.rows, dys.cols);
        let tiles = rows.div_ceil(TILE) * in_features.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let spare = CLUSTER * (clusters - busy(tiles, clusters).min(clusters));
        // Columns that the clusters without tiles read meanwhile; the rest waits for the tiles.
        let beside = beside(spare, (out_features, in_features), ranks);
        let rest = |width: usize| micros(rows, width.saturating_sub(beside));
        let made = MAKING_BACKWARD + rest(out_features + in_features);
        let swept = SWEEP_START + micros(rows, out_features) + rest(in_features);
        // With more than 32 ranks the pass was measured to cost more than it saves.
        self.makes_at_once(rows)
            && ranks <= MOST_MADE
            && (ranks > 32 || !self.sweeps(dys, ranks, true) || made < swept)
    }
}

/// Microseconds to read a matrix of halves once, at 4 TB/s.
fn micros(rows: usize, cols: usize) -> f64 {
    2.0 * rows as f64 * cols as f64 / 4e6
}
