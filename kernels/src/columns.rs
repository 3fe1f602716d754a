//! Where the members of a group stand in its rank-sized matrices.

use cudarc::driver::CudaView;

use crate::error::{Error, Result, expect_size};
use crate::rows::{Rows, padded_rank};
use crate::skinny::Scales;

/// Where the members of a group stand in its S and dS.
///
/// ```
/// use lora_kernels::GroupLayout;
///
/// let layout = GroupLayout::new(&[16, 8, 24])?;
/// assert_eq!(layout.width(), 64);
/// let offsets: Vec<usize> = layout.columns().iter().map(|c| c.offset()).collect();
/// assert_eq!(offsets, [0, 16, 32]);
/// # Ok::<(), lora_kernels::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLayout {
    columns: Vec<Columns>,
    width: usize,
}

/// The columns of one member: `offset .. offset + rank` of `width`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    offset: usize,
    rank: usize,
    width: usize,
}

impl GroupLayout {
    /// The layout of members with these ranks, in this order; each starts on a multiple of 16.
    ///
    /// # Errors
    /// [`Error::Shape`] for no members, a rank of 0, or more than 1024 ranks (padded) in all.
    pub fn new(ranks: &[usize]) -> Result<Self> {
        let sum: usize = ranks.iter().map(|&rank| padded_rank(rank)).sum();
        let width = padded_rank(sum);
        if ranks.is_empty() || ranks.contains(&0) || width > 16 * Scales::LEN {
            return Err(Error::Shape {
                what: "ranks of a group",
                expected: format!("1 or more each, up to {} in all", 16 * Scales::LEN),
                found: format!("{ranks:?}"),
            });
        }
        let mut offset = 0;
        let columns = ranks
            .iter()
            .map(|&rank| {
                let columns = Columns {
                    offset,
                    rank,
                    width,
                };
                offset += padded_rank(rank);
                columns
            })
            .collect();
        Ok(Self { columns, width })
    }

    /// Width of S and dS: the padded ranks of all members, rounded up.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The columns of each member.
    pub fn columns(&self) -> &[Columns] {
        &self.columns
    }
}

impl Columns {
    /// The first column.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Rank of the member; its columns are padded with zeros in S.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Width of the whole S.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn padded(&self) -> usize {
        padded_rank(self.rank)
    }

    /// This member's part of a whole `[rows, width]`.
    pub(crate) fn of<'a, T>(&self, whole: &'a CudaView<'a, T>, rows: usize) -> Result<Rows<'a, T>> {
        expect_size("S or dS of the group", rows * self.width, whole.len())?;
        Ok(Rows {
            data: whole.slice(self.offset.min(whole.len())..),
            rows,
            cols: self.padded(),
            stride: self.width,
        })
    }
}
