//! Launcher of Hopper's S: one pass over the input through the copy engine.

use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg, grid_x};
use crate::path::Preference;
use crate::rows::{Rows, padded_width};
use crate::skinny::{RowsMut, Scales, rank_tile};
use crate::tensor_map::TensorMap;

/// Most warps of a block.
const WARPS: usize = 16;

/// How a block takes its work, as in shrink_ring.cu.
#[derive(Clone, Copy)]
pub(crate) struct Teams {
    /// Row tiles of 16 of a warp.
    row_tiles: usize,
    /// Warps that share a ring.
    team: usize,
    /// Blocks of a multiprocessor.
    blocks: usize,
}

impl Teams {
    const OF_FEW_RANKS: [Self; 2] = [Self::of(2, 1, 2), Self::FEW_ROWS];
    /// A warp has more to multiply, so that fewer rows in more warps are faster.
    const OF_MANY_RANKS: [Self; 4] = [
        Self::of(2, 2, 1),
        Self::of(1, 3, 1),
        Self::of(1, 2, 1),
        Self::FEW_ROWS,
    ];
    const FEW_ROWS: Self = Self::of(1, 1, 2);

    /// Those to choose from.
    pub const fn all(ranks: usize) -> &'static [Self] {
        if ranks == 16 {
            &Self::OF_FEW_RANKS
        } else {
            &Self::OF_MANY_RANKS
        }
    }

    const fn of(row_tiles: usize, team: usize, blocks: usize) -> Self {
        Self {
            row_tiles,
            team,
            blocks,
        }
    }

    /// Those by which the multiprocessors have the fewest rows each; of them, those with the most rows a block, which read A
    /// least often. Blocks of the fewest rows are slower where a multiprocessor has two of them.
    fn choose(rows: usize, ranks: usize, multiprocessors: usize) -> Self {
        let blocks_of_each = |teams: &Self| rows.div_ceil(teams.rows()).div_ceil(multiprocessors);
        let all = Self::all(ranks).iter().copied();
        all.filter(|teams| teams.rows() > Self::FEW_ROWS.rows() || blocks_of_each(teams) <= 1)
            .min_by_key(|teams| blocks_of_each(teams) * teams.rows())
            .unwrap_or(Self::FEW_ROWS)
    }

    fn rows(self) -> usize {
        16 * self.row_tiles * self.team
    }

    /// Teams of a block: as many as have room for two boxes of x and of `ranks` ranks each, in no more than [`WARPS`].
    fn splits(self, ranks: usize) -> usize {
        let boxes = 2 * 128 * (self.rows() + ranks);
        if 8 * boxes <= self.shared_bytes() && 8 * self.team <= WARPS {
            8
        } else {
            4
        }
    }

    /// Bytes of dynamic shared memory.
    fn shared_bytes(self) -> usize {
        (if self.blocks == 1 { 200 } else { 104 }) << 10
    }

    /// Options of the kernel.
    pub fn defines(self, ranks: usize) -> [(&'static str, u32); 5] {
        [
            ("RT", ranks as u32),
            ("MT", self.row_tiles as u32),
            ("TEAM", self.team as u32),
            ("SPLITS", self.splits(ranks) as u32),
            ("BLOCKS", self.blocks as u32),
        ]
    }
}

impl Launcher<'_> {
    /// Whether [`Self::shrink_ring`] can run on `xs`.
    pub fn rings<T: Element>(&self, xs: &Rows<T>) -> bool {
        self.kernels.preference() != Preference::General
            && self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && xs.cols > 0
            && self.aligned(xs)
    }

    /// [`Self::shrink`] by the copy engine.
    pub fn shrink_ring<T: Element>(
        &self,
        xs: &Rows<T>,
        a: &CudaView<T>,
        scales: &Scales,
        mask: Option<Mask>,
        (s, early): (&mut RowsMut<T>, bool),
    ) -> Result<()> {
        let ranks = rank_tile(s.cols);
        let teams = Teams::choose(xs.rows, ranks, self.kernels.multiprocessors());
        let instance = Instance {
            kernel: Kernel::ShrinkRing,
            defines: [
                &[
                    ("DTYPE", T::DTYPE.define()),
                    ("ALIGNED", 1),
                    ("DROPOUT", u32::from(mask.is_some())),
                ][..],
                &teams.defines(ranks),
            ]
            .concat(),
        };
        let shared_bytes = teams.shared_bytes();
        let function = self.kernels.function(instance, shared_bytes)?;
        let (x_at, _x) = xs.data.device_ptr(self.stream);
        let (a_at, _a) = a.device_ptr(self.stream);
        let (s_at, _s) = s.data.device_ptr_mut(self.stream);
        let lda = padded_width(xs.cols);
        let x_map = TensorMap::new::<T>(x_at, (xs.rows, xs.cols, xs.stride), teams.rows())?;
        let a_map = TensorMap::new::<T>(a_at, (s.cols, lda, lda), ranks)?;
        let (rows, cols, lds) = (xs.rows as i32, xs.cols as i32, s.stride as i32);
        let (early, mask) = (i32::from(early), mask.unwrap_or_default());
        let blocks = [
            grid_x(xs.rows.div_ceil(teams.rows()))?,
            (s.cols / ranks) as u32,
            1,
        ];
        let grid = Grid {
            shared_bytes,
            ..Grid::new(blocks, (32 * teams.splits(ranks) * teams.team) as u32)
        };
        let args = [
            arg(&x_map),
            arg(&a_map),
            arg(&s_at),
            arg(&rows),
            arg(&cols),
            arg(&lds),
            arg(&early),
            arg(scales),
            arg(&mask),
        ];
        // SAFETY: arguments in the order of shrink_ring.cu; the maps clip loads to `xs`, which passed
        // `Rows::check`, and to the packed `a`; `s` has a padded row for every row of `xs`.
        unsafe { self.launch("launch of shrink_ring", &function, grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_the_card_and_rings_fit() {
        let chosen = |rows, ranks| {
            let teams = Teams::choose(rows, ranks, 132);
            [teams.rows(), teams.splits(ranks), teams.blocks]
        };
        assert_eq!(chosen(8192, 16), [32, 8, 2]);
        assert_eq!(chosen(5888, 16), [32, 8, 2]);
        assert_eq!(chosen(3000, 16), [32, 8, 2]);
        assert_eq!(chosen(2112, 16), [16, 8, 2]);
        assert_eq!(chosen(8192, 64), [64, 4, 1]);
        assert_eq!(chosen(5376, 64), [48, 4, 1]);
        assert_eq!(chosen(4096, 64), [32, 8, 1]);
        assert_eq!(chosen(2112, 64), [16, 4, 2]);
        assert_eq!(chosen(2113, 64), [32, 8, 1]);
        for ranks in [16, 32, 64] {
            for teams in Teams::all(ranks) {
                let boxes = 2 * 128 * (teams.rows() + ranks);
                assert!(teams.splits(ranks) * boxes <= teams.shared_bytes());
                let warps = teams.splits(ranks) * teams.team;
                let sums = 4 * teams.splits(ranks) * teams.rows() * ranks;
                assert!(warps <= WARPS && sums <= teams.shared_bytes());
            }
        }
    }
}
