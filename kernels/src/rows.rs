//! Matrices as the kernels see them.

use cudarc::driver::CudaView;

use crate::error::{Error, Result};

/// A matrix of activations: rows are packed and `stride` elements apart.
#[derive(Debug)]
pub struct Rows<'a, T> {
    /// Elements, from the first row on.
    pub data: CudaView<'a, T>,
    /// Number of rows (tokens).
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Elements from one row to the next, at least `cols`.
    pub stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// A matrix without gaps between rows.
    pub fn packed(data: CudaView<'a, T>, rows: usize, cols: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            stride: cols,
        }
    }

    pub(crate) fn check(&self, what: &'static str) -> Result<()> {
        let needed = self.rows.checked_sub(1).map_or(0, |last| {
            last.saturating_mul(self.stride).saturating_add(self.cols)
        });
        if self.data.len() < needed || self.stride < self.cols || self.cols > i32::MAX as usize - 64
        {
            return Err(Error::Shape {
                what,
                expected: format!(
                    "{} rows of {} elements, {} apart",
                    self.rows, self.cols, self.stride
                ),
                found: format!("{} elements", self.data.len()),
            });
        }
        Ok(())
    }
}

/// Rank as the kernels see it: whole tensor core tiles.
pub(crate) fn padded_rank(rank: usize) -> usize {
    rank.next_multiple_of(match rank {
        0..=32 => 16,
        33..=64 => 32,
        _ => 64,
    })
}

/// Width as the kernels see it: whole steps of a warp.
pub(crate) fn padded_width(cols: usize) -> usize {
    cols.next_multiple_of(64)
}
