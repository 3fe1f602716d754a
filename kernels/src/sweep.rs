//! Launcher of Hopper's one-pass kernel, which makes both products of a matrix with rank-sized ones.

use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg, grid_x};
use crate::masking::{Bits, BitsArg, Masking};
use crate::rows::{Rows, padded_width};
use crate::skinny::{Partial, RowsMut, Scales};
use crate::tensor_map::TensorMap;

// As in sweep.cu and cluster_sum.cuh.
const STRIP: usize = 64;
const LOAD_ROWS: usize = 16;
const TILE_COLS: usize = 64;
const SHARED_BYTES: usize = 226 << 10;
const MOST_GROUP: usize = 8;

/// Most ranks, padded: 16, 32 or 64.
const MOST: usize = 64;

/// Most rows and columns that the kernel can count.
const MOST_SIZE: usize = 1 << 30;

/// Most pairs of tiles in a row of a block, by the registers that a warpgroup has for the sums of one of each.
pub(crate) const fn most_pairs(ranks: usize) -> usize {
    if ranks == 16 { 14 } else { 256 / ranks }
}

/// How many warpgroups load and draw, beside the two that multiply.
const fn service(ranks: usize, draws: bool) -> usize {
    if draws && ranks == 16 { 2 } else { 1 }
}

/// `s[rows, ranks] = scales · D(z) pᵀ`, bits to draw on the way, and what `s` is for next.
pub(crate) struct Down<'a, 'b, T> {
    /// Ranks by padded width of z.
    pub p: &'a CudaView<'a, T>,
    pub scales: &'a Scales,
    pub s: &'a mut RowsMut<'b, T>,
    pub bits: Option<&'a mut Bits>,
    pub next: Option<Next<'a, T>>,
}

/// Partial sums to make of `sᵀ D(xs)`, columns from `first_col` on, masked by the bits that are drawn, if any.
pub(crate) struct Next<'a, T> {
    pub xs: &'a Rows<'a, T>,
    pub first_col: usize,
}

/// Partial sums that a pass makes.
pub(crate) struct Swept {
    /// Of `qᵀ D(z)`.
    pub outer: Partial,
    /// Of [`Next`].
    pub next: Option<Partial>,
}

impl Launcher<'_> {
    /// Whether [`Self::sweep`] can run on `z` with `ranks` padded ranks, for one product or both.
    pub fn sweeps<T: Element>(&self, z: &Rows<T>, ranks: usize, both: bool) -> bool {
        self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && ranks <= MOST
            && (1..=MOST_SIZE).contains(&z.rows)
            && (1..=MOST_SIZE).contains(&z.cols)
            && self.aligned(z)
            && (!both || Columns::new(z.cols, ranks).group <= MOST_GROUP)
    }

    /// Whether [`Self::sweep`] of both products of `z` can go on through `cols` columns of `xs`.
    pub fn sweeps_next<T: Element>(
        &self,
        z: &Rows<T>,
        ranks: usize,
        xs: &Rows<T>,
        cols: usize,
    ) -> bool {
        self.sweeps(z, ranks, true)
            && (1..=MOST_SIZE).contains(&xs.cols)
            && self.aligned(xs)
            && Columns::new(z.cols, ranks).pairs_of(cols) <= most_pairs(ranks)
    }

    /// One pass over `z` for partial sums of `qᵀ D(z)`, and for `down`.
    pub fn sweep<T: Element>(
        &self,
        z: &Rows<T>,
        q: &Rows<T>,
        down: Option<Down<T>>,
        masking: Masking,
    ) -> Result<Swept> {
        let ranks = q.cols;
        let draws = down.as_ref().is_some_and(|down| down.bits.is_some());
        let columns = Columns::new(z.cols, ranks);
        let Columns { group, pairs } = columns;
        let next = down.as_ref().and_then(|down| down.next.as_ref());
        let next_pairs = next.map_or(0, |next| columns.pairs_of(next.xs.cols - next.first_col));
        let instance = Instance {
            kernel: Kernel::Sweep,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("DROPOUT", masking.define()),
                ("RT", ranks as u32),
                ("PAIRS", pairs as u32),
                ("DOWN", u32::from(down.is_some())),
                ("BITS", u32::from(draws)),
                ("NEXT", next_pairs as u32),
            ],
        };
        let function = self.kernels.function(instance.clone(), SHARED_BYTES)?;
        let threads = 128 * (2 + service(ranks, draws));
        let mut grid = Grid {
            shared_bytes: SHARED_BYTES,
            cluster: down.is_some().then_some(group as u32),
            ..Grid::new([group as u32, 1, 1], threads as u32)
        };
        let groups = match grid.cluster {
            Some(size) => self
                .kernels
                .clusters(&instance, size, || self.active_clusters(&function, grid))?,
            None => (self.kernels.multiprocessors() / group).max(1),
        };
        let block_rows = z.rows.div_ceil(groups).next_multiple_of(STRIP);
        let blocks = z.rows.div_ceil(block_rows);
        grid.blocks[0] = grid_x(group * blocks)?;

        let mut part = self.alloc::<f32>("partial gradients", blocks * ranks * z.cols)?;
        let (part_at, part_guard) = part.device_ptr_mut(self.stream);
        let (z_at, _z) = z.data.device_ptr(self.stream);
        let z_map = TensorMap::new::<T>(z_at, (z.rows, z.cols, z.stride), LOAD_ROWS)?;
        let (q_at, _q) = q.data.device_ptr(self.stream);
        let q_map = TensorMap::narrow::<T>(q_at, (q.rows, ranks, q.stride), STRIP)?;
        let (no_scales, lds) = (
            Scales::all(1.0),
            down.as_ref().map_or(0, |down| down.s.stride),
        );
        let scales = down.as_ref().map_or(&no_scales, |down| down.scales);
        let mut next_part = match next {
            Some(next) => {
                let len = blocks * ranks * next.xs.cols;
                Some(self.alloc::<f32>("partial gradients", len)?)
            }
            None => None,
        };
        let next_ptr = next_part
            .as_mut()
            .map(|part| part.device_ptr_mut(self.stream));
        let xs_ptr = next.map(|next| next.xs.data.device_ptr(self.stream));
        let (next_map, next_arg) = match (next, &next_ptr, &xs_ptr) {
            (Some(Next { xs, first_col }), Some((part, _)), Some((at, _))) => {
                let map = TensorMap::new::<T>(*at, (xs.rows, xs.cols, xs.stride), LOAD_ROWS)?;
                let arg = NextArg {
                    part: *part,
                    cols: xs.cols as i32,
                    first_col: *first_col as i32,
                };
                (map, arg)
            }
            _ => (z_map, NextArg::default()),
        };
        let next_made = next.map(|next| (next.xs.cols, next.first_col..next.xs.cols));
        let p = down.as_ref().map(|down| down.p.device_ptr(self.stream));
        let p_map = match &p {
            Some((at, _)) => {
                let width = padded_width(z.cols);
                TensorMap::new::<T>(*at, (ranks, width, width), ranks)?
            }
            None => z_map,
        };
        let (s, drawn) = match down {
            Some(Down { s, bits, .. }) => (Some(s), bits),
            None => (None, None),
        };
        let s = s.map(|s| s.data.device_ptr_mut(self.stream));
        let s_at = s.as_ref().map_or(0, |(at, _)| *at);
        let s_map = match &s {
            Some((at, _)) if next_made.is_some() => {
                TensorMap::narrow::<T>(*at, (z.rows, ranks, lds), STRIP)?
            }
            _ => q_map,
        };
        let bits = match (drawn, masking.bits()) {
            (Some(bits), _) => {
                let at = bits.keep_mut().device_ptr_mut(self.stream).0;
                bits.arg(at)
            }
            (None, Some(bits)) => bits.arg(bits.keep().device_ptr(self.stream).0),
            (None, None) => BitsArg::default(),
        };
        let (rows, cols, lds) = (z.rows as i32, z.cols as i32, lds as i32);
        let (block_rows, group) = (block_rows as i32, group as i32);
        let mask = masking.mask().unwrap_or_default();
        let args = [
            arg(&z_map),
            arg(&p_map),
            arg(&q_map),
            arg(&s_at),
            arg(&part_at),
            arg(&rows),
            arg(&cols),
            arg(&lds),
            arg(&block_rows),
            arg(&group),
            arg(scales),
            arg(&mask),
            arg(&bits),
            arg(&next_map),
            arg(&s_map),
            arg(&next_arg),
        ];
        // SAFETY: arguments in the order of sweep.cu; `z` passed `Rows::check` and the maps clip loads to it, to
        // `q`, to `p`, which is packed, and to the other matrix, which passed it too; `s` has a padded row for every
        // row of `z`, and the partial sums hold every block of rows.
        unsafe { self.launch("launch of sweep", &function, grid, &args) }?;
        drop((part_guard, next_ptr));
        let partial = |part, cols, made| Partial {
            part,
            splits: blocks,
            ranks,
            cols,
            made,
        };
        let next = next_part.zip(next_made);
        Ok(Swept {
            outer: partial(part, z.cols, 0..z.cols),
            next: next.map(|(part, (cols, made))| partial(part, cols, made)),
        })
    }
}

/// Laid out as `Next` in sweep.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct NextArg {
    part: u64,
    cols: i32,
    first_col: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Next`.
unsafe impl DeviceRepr for NextArg {}

/// How the columns are shared.
#[derive(Debug, PartialEq, Eq)]
struct Columns {
    /// Blocks that share them.
    group: usize,
    /// Pairs of tiles in a row of a block.
    pairs: usize,
}

impl Columns {
    /// For the largest cluster, of two or more, of which nine in ten blocks have work all the time, or for more
    /// blocks where their sums need the registers.
    fn new(cols: usize, ranks: usize) -> Self {
        let all = cols.div_ceil(2 * TILE_COLS);
        let even = |&group: &usize| 10 * all >= 9 * group * all.div_ceil(group);
        let group = (2..=MOST_GROUP.min(all)).rev().find(even).unwrap_or(2);
        let group = group.max(all.div_ceil(most_pairs(ranks)));
        let pairs = all.div_ceil(group);
        Self { group, pairs }
    }

    /// Pairs of tiles that a block of the group takes in a row of `cols` other columns.
    fn pairs_of(&self, cols: usize) -> usize {
        cols.div_ceil(2 * TILE_COLS * self.group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_shared_evenly() {
        for (cols, ranks, group, pairs) in [
            (8, 16, 2, 1),
            (1000, 16, 8, 1),
            (2048, 16, 8, 2),
            (4096, 16, 8, 4),
            (14336, 16, 8, 14),
            (14400, 16, 9, 13),
            (4096, 64, 8, 4),
            (14336, 64, 28, 4),
        ] {
            let expected = Columns { group, pairs };
            assert_eq!(Columns::new(cols, ranks), expected, "{cols} columns");
            assert!(2 * TILE_COLS * group * pairs >= cols && pairs <= most_pairs(ranks));
        }
    }
}
