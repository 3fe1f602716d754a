//! Work beside the tiles of the Hopper kernel: gradients of the adapter.

use cudarc::driver::DeviceRepr;

use crate::hopper::SHARED_BYTES;
use crate::rows::Rows;
use crate::skinny::Partial;

// As in side.cuh.
pub(crate) const BOX_ROWS: usize = 32;
pub(crate) const CHUNK: usize = 512;
/// Rings of boxes and the bits of their masks.
const RING_BYTES: usize = 8 * 4 * (BOX_ROWS * 64 * 2 + 512);

/// Multiplications of the tensor cores of the whole card while one block of side work reads a byte:
/// about 770 TFLOP/s against 48 GB/s, measured beside full tiles on an H200.
const FLOPS_PER_SIDE_BYTE: usize = 16_000;

/// Partial sums of the adapter's gradients, of at most [`MOST_MADE`](crate::making::MOST_MADE) ranks.
pub(crate) struct SideWork<'a, T> {
    /// `S` of the forward `[rows, padded_rank]`, for the gradient of B.
    pub b: Option<&'a Rows<'a, T>>,
    /// The input of the layer, for the gradient of A, whose other factor is `q`; masked like the output.
    pub a: Option<&'a Rows<'a, T>>,
}

/// Partial sums of the adapter's gradients that were made beside a product.
#[derive(Default)]
pub(crate) struct Parts {
    pub a: Option<Partial>,
    pub b: Option<Partial>,
}

/// Columns of a matrix that `spare` blocks read while the others make the product.
pub(crate) fn beside(spare: usize, w_rows: usize, w_cols: usize) -> usize {
    spare * w_rows * w_cols / FLOPS_PER_SIDE_BYTE
}

/// Rows of a unit of side work, for about `units` of them in `chunks` of columns: more rows make fewer
/// partial sums to add, fewer spread better.
pub(crate) fn segment_rows(rows: usize, rank: usize, units: usize, chunks: usize) -> usize {
    let most = (SHARED_BYTES - RING_BYTES) / (2 * rank) / 128 * 128;
    (rows * chunks)
        .div_ceil(units.max(1))
        .next_multiple_of(128)
        .max(if rank > 32 { 512 } else { 256 })
        .min(most)
}

/// Clusters with tiles: as many as finish as soon as all would, so that the others have time.
pub(crate) fn busy(tiles: usize, clusters: usize) -> usize {
    tiles.div_ceil(tiles.div_ceil(clusters))
}

/// Work beside the tiles, laid out as in side.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct SideArg {
    pub q: [u64; 2],
    pub part: [u64; 2],
    pub strides: [i32; 2],
    pub cols: [i32; 2],
    pub segment_rows: i32,
    pub all: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for SideArg {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_side_work_fit() {
        for rank in [16, 32, 64] {
            for rows in [1, 128, 2048, 8192, 100_000] {
                for (units, chunks) in [(0, 0), (4, 1), (528, 36), (528, 2)] {
                    let found = segment_rows(rows, rank, units, chunks);
                    assert!(
                        found >= 256 && found.is_multiple_of(128),
                        "{found} of {rows}"
                    );
                    assert!(RING_BYTES + 2 * rank * found <= SHARED_BYTES);
                }
            }
        }
    }
}
