//! Launcher of Hopper's one-pass kernel, which makes both products of a matrix with rank-sized ones.

use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg};
use crate::masking::{Bits, BitsArg, Masking};
use crate::rows::{Rows, padded_width};
use crate::skinny::{Partial, RowsMut, Scales};
use crate::tensor_map::TensorMap;

// As in sweep.cu.
const BOX_ROWS: usize = 32;
const CHUNK: usize = 512;
const WARPS: usize = 8;
const BOX_BYTES: usize = 32 * 64 * 2;
const BITS_BYTES: usize = 32 * 16;
/// Warps that draw bits.
const BITS_WARPS: usize = 4;
/// Dynamic shared memory that a block may have, less what the kernel declares itself.
const SHARED_LIMIT: usize = 226 * 1024;
const LARGEST_GROUP: usize = 8;

/// Most ranks of the partial sums alone.
pub(crate) const ONE: usize = 64;
/// Most ranks of both products and drawing bits on the way, by the registers they take.
pub(crate) const DRAWING: usize = 16;
/// Most ranks of both products, by the registers they take.
pub(crate) const fn both(masked: bool) -> usize {
    if masked { 16 } else { 32 }
}

/// `s[rows, ranks] = scales · D(z) pᵀ`, and bits to draw on the way.
pub(crate) struct Down<'a, 'b, T> {
    /// Ranks by padded width of z.
    pub p: &'a CudaView<'a, T>,
    pub scales: &'a Scales,
    pub s: &'a mut RowsMut<'b, T>,
    pub bits: Option<&'a mut Bits>,
}

impl Launcher<'_> {
    /// Whether [`Self::sweep`] can run on `z` with up to `most` padded ranks.
    pub fn sweeps<T: Element>(&self, z: &Rows<T>, ranks: usize, most: usize) -> bool {
        self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && ranks <= most
            && z.rows > 0
            && self.aligned(z)
    }

    /// One pass over `z` for partial sums of `qᵀ D(z)`, and for `down`.
    pub fn sweep<T: Element>(
        &self,
        z: &Rows<T>,
        q: &Rows<T>,
        down: Option<Down<T>>,
        masking: Masking,
    ) -> Result<Partial> {
        let ranks = q.cols;
        let instance = Instance {
            kernel: Kernel::Sweep,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("DROPOUT", masking.define()),
                ("RT", ranks as u32),
                ("DOWN", u32::from(down.is_some())),
                (
                    "BITS",
                    u32::from(down.as_ref().is_some_and(|d| d.bits.is_some())),
                ),
            ],
        };
        let draws = down.as_ref().is_some_and(|down| down.bits.is_some());
        let warps = WARPS + if draws { BITS_WARPS } else { 0 };
        let shared = Shared::new(ranks, down.is_some(), masking.bits().is_some());
        let function = self.kernels.function(instance.clone(), SHARED_LIMIT)?;
        let group = group(z.cols.div_ceil(CHUNK));
        let mut grid = Grid {
            shared_bytes: SHARED_LIMIT,
            cluster: (down.is_some() && group > 1).then_some(group as u32),
            ..Grid::new([group as u32, 1, 1], 32 * warps as u32)
        };
        let groups = match grid.cluster {
            Some(size) => self
                .kernels
                .clusters(&instance, size, || self.active_clusters(&function, grid))?,
            None => self.kernels.multiprocessors() / group,
        };
        let block_rows = shared.block_rows(z.rows, groups);
        let blocks = z.rows.div_ceil(block_rows);
        grid.blocks[0] = (group * groups.min(blocks)) as u32;
        grid.shared_bytes = shared.bytes(block_rows);

        let mut part = self.alloc::<f32>("partial gradients", blocks * ranks * z.cols)?;
        let (part_at, part_guard) = part.device_ptr_mut(self.stream);
        let (z_at, _z) = z.data.device_ptr(self.stream);
        let z_map = TensorMap::new::<T>(z_at, (z.rows, z.cols, z.stride), BOX_ROWS)?;
        let (no_scales, lds) = (
            Scales::all(1.0),
            down.as_ref().map_or(0, |d| d.s.stride as i32),
        );
        let scales = down.as_ref().map_or(&no_scales, |down| down.scales);
        let p = down.as_ref().map(|down| down.p.device_ptr(self.stream));
        let p_at = p.as_ref().map_or(0, |(at, _)| *at);
        let (s, drawn) = match down {
            Some(Down { s, bits, .. }) => (Some(s), bits),
            None => (None, None),
        };
        let s = s.map(|s| s.data.device_ptr_mut(self.stream));
        let s_at = s.as_ref().map_or(0, |(at, _)| *at);
        let bits = match (drawn, masking.bits()) {
            (Some(bits), _) => {
                let at = bits.keep_mut().device_ptr_mut(self.stream).0;
                bits.arg(at)
            }
            (None, Some(bits)) => bits.arg(bits.keep().device_ptr(self.stream).0),
            (None, None) => BitsArg::default(),
        };
        let (q_at, _q) = q.data.device_ptr(self.stream);
        let (rows, cols, ldp) = (z.rows as i32, z.cols as i32, padded_width(z.cols) as i32);
        let ldq = q.stride as i32;
        let (block_rows, group) = (block_rows as i32, group as i32);
        let mask = masking.mask().unwrap_or_default();
        let args = [
            arg(&z_map),
            arg(&p_at),
            arg(&q_at),
            arg(&s_at),
            arg(&part_at),
            arg(&rows),
            arg(&cols),
            arg(&ldp),
            arg(&ldq),
            arg(&lds),
            arg(&block_rows),
            arg(&group),
            arg(scales),
            arg(&mask),
            arg(&bits),
        ];
        // SAFETY: arguments in the order of sweep.cu; `z` passed `Rows::check` and the map clips loads
        // to it, `p` is packed, `q` and `s` have a padded row for every row of `z`, and `part` holds
        // every block of rows.
        unsafe { self.launch("launch of sweep", &function, grid, &args) }?;
        drop(part_guard);
        Ok(Partial {
            part,
            splits: blocks,
            ranks,
            cols: z.cols,
            first_col: 0,
        })
    }
}

/// Blocks that share the columns: the most of which nine in ten have work all the time.
fn group(chunks: usize) -> usize {
    (1..=LARGEST_GROUP.min(chunks))
        .rev()
        .find(|&group| 10 * chunks >= 9 * group * chunks.div_ceil(group))
        .unwrap_or(1)
}

/// Shared memory of a block: some once, some for each of its rows.
struct Shared {
    fixed: usize,
    row: usize,
}

impl Shared {
    fn new(ranks: usize, down: bool, masked: bool) -> Self {
        let stages = if down { 3 } else { 4 };
        let slot = BOX_BYTES + if masked { BITS_BYTES } else { 0 };
        let buffers = if ranks == 16 { 2 } else { 1 };
        let meet = buffers * WARPS * BOX_ROWS * (ranks + 8) * 4;
        let (s_row, q_row) = (ranks * 4, ranks * 2);
        Self {
            fixed: WARPS * stages * slot + if down { meet } else { 0 },
            row: q_row + if down { s_row } else { 0 },
        }
    }

    fn bytes(&self, rows: usize) -> usize {
        self.fixed + rows * self.row
    }

    /// Rows of a block so that every group gets as many blocks, of whole boxes that fit.
    fn block_rows(&self, rows: usize, groups: usize) -> usize {
        let most = (SHARED_LIMIT - self.fixed) / self.row / BOX_ROWS * BOX_ROWS;
        let turns = rows.div_ceil(groups * most);
        rows.div_ceil(groups * turns).next_multiple_of(BOX_ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_shared_evenly() {
        for (chunks, expected) in [(1, 1), (4, 4), (8, 8), (16, 8), (28, 7), (27, 7), (9, 5)] {
            assert_eq!(group(chunks), expected, "{chunks} chunks");
        }
    }

    #[test]
    fn blocks_of_rows_fit_and_cover() {
        for ranks in [16, 32, 64] {
            for down in [false, true] {
                let shared = Shared::new(ranks, down, !down);
                for rows in [1, 31, 512, 2048, 8192, 100_000] {
                    let block_rows = shared.block_rows(rows, 16);
                    assert!(block_rows >= BOX_ROWS && block_rows.is_multiple_of(BOX_ROWS));
                    assert!(shared.bytes(block_rows) <= SHARED_LIMIT);
                }
            }
        }
    }
}
