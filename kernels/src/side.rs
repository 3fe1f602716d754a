//! Work beside the tiles of the Hopper kernel: gradients of the adapter.

use cudarc::driver::DeviceRepr;

use crate::hopper::SHARED_BYTES;
use crate::reduce::{Gradient, Sum, SumArg};
use crate::rows::Rows;
use crate::skinny::Partial;

// As in side.cuh.
pub(crate) const BOX_ROWS: usize = 32;
pub(crate) const CHUNK: usize = 512;
/// Rings of boxes and the bits of their masks, and rows of q.
const BYTES: usize = 8 * 4 * (BOX_ROWS * 64 * 2 + 512) + 2048 * 16 * 2;
const _: () = assert!(BYTES <= SHARED_BYTES);

/// Multiplications of the tensor cores of the whole card while one block of side work reads a byte:
/// about 770 TFLOP/s against 48 GB/s, measured beside full tiles on an H200.
const FLOPS_PER_SIDE_BYTE: usize = 16_000;

/// Gradients of the adapter, of at most [`MOST_MADE`](crate::making::MOST_MADE) ranks.
pub(crate) struct SideWork<'a, T> {
    /// Of B, from `S` of the forward `[rows, padded_rank]` and the input of the product.
    pub b: Option<(&'a Rows<'a, T>, &'a Gradient<'a>)>,
    /// Of A, from the input of the layer, masked like the output, and `q`.
    pub a: Option<(&'a Rows<'a, T>, &'a Gradient<'a>)>,
    /// From the partial sums of the kernel before this one, where `q` is given.
    pub before: Option<Sum<'a>>,
}

/// What is left of [`SideWork`]: partial sums, of gradients that are not made by one block alone.
#[derive(Default)]
pub(crate) struct Parts {
    pub a: Option<Partial>,
    pub b: Option<Partial>,
}

/// Columns of a matrix that `spare` blocks read while the others make the product.
pub(crate) fn beside(spare: usize, w_rows: usize, w_cols: usize) -> usize {
    spare * w_rows * w_cols / FLOPS_PER_SIDE_BYTE
}

/// Rows of a unit that `spare` blocks make beside the tiles: all, where the `chunks` of columns leave no
/// block idle for long.
pub(crate) fn rows_beside(rows: usize, spare: usize, chunks: usize) -> usize {
    let spare = spare.max(1);
    let even = 10 * chunks.next_multiple_of(spare) <= 11 * chunks;
    let segments = if even { 1 } else { spare };
    rows.div_ceil(segments).next_multiple_of(128)
}

/// Rows of a unit that all of `blocks` make: few, so that they are done at once, but not so few that their
/// partial sums cost more.
pub(crate) fn rows_together(rows: usize, blocks: usize, chunks: usize, rank: usize) -> usize {
    (rows * chunks)
        .div_ceil(4 * blocks)
        .next_multiple_of(128)
        .max(if rank > 32 { 512 } else { 256 })
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
    pub sums: [SumArg; 2],
    pub before: SumArg,
    pub strides: [i32; 2],
    pub segment_rows: i32,
    pub all: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for SideArg {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_blocks_take_whole_columns_where_they_divide() {
        let rows = |spare, chunks| rows_beside(8192, spare, chunks);
        assert_eq!([rows(4, 8), rows(4, 36), rows(2, 7)], [8192, 8192, 4096]);
        assert_eq!([rows(4, 10), rows(4, 1), rows(0, 3)], [2048, 2048, 8192]);
        assert_eq!(rows_beside(1, 4, 8), 128);
    }

    #[test]
    fn all_blocks_take_a_few_units_each() {
        assert_eq!(rows_together(8192, 132, 4, 16), 256);
        assert_eq!(rows_together(8192, 132, 36, 16), 640);
        assert_eq!(rows_together(8192, 132, 16, 64), 512);
    }
}
