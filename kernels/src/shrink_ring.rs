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

/// How the warps of a block share its work, as in shrink_ring.cu.
#[derive(Clone, Copy)]
pub(crate) struct Teams {
    /// Row tiles of 16 of a warp.
    pub row_tiles: usize,
    /// Warps that share a ring.
    pub team: usize,
}

impl Teams {
    /// From the most rows a block to the fewest.
    pub const ALL: [Self; 3] = [Self::of(2, 2), Self::of(2, 1), Self::of(1, 1)];

    const fn of(row_tiles: usize, team: usize) -> Self {
        Self { row_tiles, team }
    }

    fn rows(self) -> usize {
        16 * self.row_tiles * self.team
    }

    fn threads(self, ranks: usize) -> usize {
        let splits = if ranks <= 16 * self.team { 8 } else { 4 };
        32 * splits * self.team
    }

    /// Bytes of dynamic shared memory: for one block a multiprocessor, or two.
    fn shared_bytes(self) -> usize {
        if self.rows() > 32 {
            200 << 10
        } else {
            104 << 10
        }
    }
}

impl Launcher<'_> {
    /// Whether [`Self::shrink_ring`] can run on `xs`.
    pub fn rings<T: Element>(&self, xs: &Rows<T>) -> bool {
        self.kernels.preference() != Preference::General
            && self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
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
        // More rows a block read `a` less often; more blocks fill the card.
        let full_card = |teams: &Teams| {
            xs.rows.div_ceil(teams.rows()) * 10 >= 9 * self.kernels.multiprocessors()
        };
        let [.., smallest] = Teams::ALL;
        let teams = Teams::ALL.into_iter().find(full_card).unwrap_or(smallest);
        let instance = Instance {
            kernel: Kernel::ShrinkRing,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("DROPOUT", u32::from(mask.is_some())),
                ("RT", ranks as u32),
                ("MT", teams.row_tiles as u32),
                ("TEAM", teams.team as u32),
            ],
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
            ..Grid::new(blocks, teams.threads(ranks) as u32)
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
