//! Launchers of the one-pass kernels, whose narrow side is the rank.

use std::ops::Range;

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::launch::{Grid, Launcher, arg, grid_x};
use crate::masking::Masking;
use crate::rows::{Rows, padded_width};
use crate::sweep::{Down, Swept};

/// Factors of the columns of S and dS, one for every 16 of them; as in tile.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Scales([f32; Scales::LEN]);

// SAFETY: plain words in the layout of the kernel's struct `Scales`.
unsafe impl DeviceRepr for Scales {}

impl Scales {
    pub const LEN: usize = 64;

    /// One factor for all.
    pub fn all(scale: f32) -> Self {
        Self([scale; Self::LEN])
    }

    /// Sets the factor of 16-column groups `groups`.
    pub fn set(&mut self, groups: Range<usize>, scale: f32) {
        self.0[groups].fill(scale);
    }
}

/// Columns of S or dS to write: `rows` of `cols` elements, `stride` apart.
pub(crate) struct RowsMut<'a, T> {
    pub data: CudaViewMut<'a, T>,
    pub cols: usize,
    pub stride: usize,
}

impl Launcher<'_> {
    /// `s[rows, ranks] = scales · D(x) aᵀ`, with `a` packed as ranks by padded width; `s.cols` is a
    /// padded rank. `early` says that `xs` was there before the kernel before this one, which packed `a`: it
    /// need not await that one to be loaded.
    pub fn shrink<T: Element>(
        &self,
        xs: &Rows<T>,
        a: &CudaView<T>,
        scales: &Scales,
        mask: Option<Mask>,
        (s, early): (&mut RowsMut<T>, bool),
    ) -> Result<()> {
        if xs.rows == 0 {
            return Ok(());
        }
        if self.rings(xs) {
            return self.shrink_ring(xs, a, scales, mask, (s, early));
        }
        let padded = s.cols;

        let tile = rank_tile(padded);
        // More rows a block reuse `a` better; more blocks fill the card.
        let full_card = |row_tiles: usize| {
            xs.rows.div_ceil(16 * row_tiles) * 10 >= 9 * self.kernels.multiprocessors()
        };
        let row_tiles = match (T::DTYPE, tile) {
            (DType::F32, 17..) => 1,
            (DType::Bf16 | DType::F16, 33..) if full_card(4) => 4,
            _ if full_card(2) => 2,
            _ => 1,
        };
        let warps = if xs.rows.div_ceil(16) * (padded / tile) < self.kernels.multiprocessors()
            && tile <= 32
        {
            16
        } else {
            8
        };
        let function = self.function(
            Kernel::Shrink,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", u32::from(self.aligned(xs))),
                ("DROPOUT", u32::from(mask.is_some())),
                ("RT", tile as u32),
                ("MT", row_tiles as u32),
                ("WARPS", warps as u32),
            ],
        )?;
        let (rows, ldx, cols) = (xs.rows as i64, xs.stride as i64, xs.cols as i32);
        let (lda, lds) = (padded_width(xs.cols) as i32, s.stride as i32);
        let mask = mask.unwrap_or_default();
        let (x_at, _x) = xs.data.device_ptr(self.stream);
        let (a_at, _a) = a.device_ptr(self.stream);
        let (s_at, _s) = s.data.device_ptr_mut(self.stream);
        let blocks = xs.rows.div_ceil(16 * row_tiles);
        let grid = Grid::new(
            [grid_x(blocks)?, (padded / tile) as u32, 1],
            32 * warps as u32,
        );
        let args = [
            arg(&x_at),
            arg(&a_at),
            arg(&s_at),
            arg(&rows),
            arg(&ldx),
            arg(&cols),
            arg(&lda),
            arg(&lds),
            arg(scales),
            arg(&mask),
        ];
        // SAFETY: arguments in the order of shrink.cu; `xs` passed `Rows::check`, `a` is packed and
        // `s` has a padded row for every row of `xs`.
        unsafe { self.launch("launch of shrink", &function, grid, &args) }
    }

    /// [`Self::shrink`] of `z` into `down`, and partial sums of `qᵀ D(z)` and of what is next where the same
    /// pass can make them.
    pub fn shrink_and_outer<T: Element>(
        &self,
        z: &Rows<T>,
        mut down: Down<T>,
        q: &Rows<T>,
        mask: Option<Mask>,
    ) -> Result<Option<Swept>> {
        if self.sweeps(z, q.cols, true) {
            let swept = self.sweep(z, q, Some(down), Masking::drawn(mask))?;
            return Ok(Some(swept));
        }
        if let Some(bits) = down.bits.take() {
            self.draw(bits)?;
        }
        self.shrink(z, down.p, down.scales, mask, (down.s, false))?;
        Ok(None)
    }

    /// `out[rows, cols] = D(q pᵀ) + bias`, with `p` packed as padded cols by ranks.
    pub fn expand<T: Element>(
        &self,
        q: &Rows<T>,
        p: &CudaView<T>,
        bias: Option<&CudaView<T>>,
        mask: Option<Mask>,
        (out, cols): (&mut CudaSlice<T>, usize),
    ) -> Result<()> {
        if q.rows == 0 {
            return Ok(());
        }
        let aligned = cols.is_multiple_of(T::DTYPE.vector());
        let row_tiles = if q.rows >= 64 { 4 } else { 1 };
        let function = self.function(
            Kernel::Expand,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", u32::from(aligned)),
                ("DROPOUT", u32::from(mask.is_some())),
                ("MT", row_tiles as u32),
            ],
        )?;
        let blocks = q.rows.div_ceil(16 * row_tiles) * cols.div_ceil(8 * 4 * T::DTYPE.vector());
        let (rows, cols, rank) = (q.rows as i64, cols as i32, q.cols as i32);
        let (ldq, with_bias) = (q.stride as i32, i32::from(bias.is_some()));
        let mask = mask.unwrap_or_default();
        let (q_at, _q) = q.data.device_ptr(self.stream);
        let (p_at, _p) = p.device_ptr(self.stream);
        let bias = bias.map(|bias| bias.device_ptr(self.stream));
        let bias_at = bias.as_ref().map_or(0, |(at, _)| *at);
        let (out_at, _out) = out.device_ptr_mut(self.stream);
        let args = [
            arg(&q_at),
            arg(&p_at),
            arg(&bias_at),
            arg(&out_at),
            arg(&rows),
            arg(&cols),
            arg(&rank),
            arg(&ldq),
            arg(&with_bias),
            arg(&mask),
        ];
        // SAFETY: arguments in the order of expand.cu; `q` and `p` are padded, `bias` was checked to
        // have `cols` elements and `out` has rows * cols.
        unsafe {
            let grid = Grid::new([grid_x(blocks)?, 1, 1], 256);
            self.launch("launch of expand", &function, grid, &args)
        }
    }

    /// Partial sums of `qᵀ D(z)`: `[splits, q.cols, z.cols]`, to be added up by [`Self::reduce`].
    pub fn outer<T: Element>(&self, z: &Rows<T>, q: &Rows<T>, masking: Masking) -> Result<Partial> {
        if self.sweeps(z, q.cols, false) {
            return Ok(self.sweep(z, q, None, masking)?.outer);
        }
        let (padded, mask) = (q.cols, masking.mask());
        if z.rows == 0 {
            return Ok(Partial {
                part: self.alloc("partial gradients", 0)?,
                splits: 0,
                ranks: padded,
                cols: z.cols,
                made: 0..z.cols,
            });
        }
        let tile = rank_tile(padded);
        let block_cols = 8 * T::DTYPE.vector() * if tile <= 32 { 2 } else { 1 };
        let col_blocks = z.cols.div_ceil(block_cols);
        // One wave of two blocks a multiprocessor, of 256 rows or more each.
        let splits = (2 * self.kernels.multiprocessors() / (col_blocks * (padded / tile)))
            .min(z.rows.div_ceil(256))
            .max(1);
        let rows_per_split = z.rows.div_ceil(splits).next_multiple_of(16);
        let splits = z.rows.div_ceil(rows_per_split);
        let function = self.function(
            Kernel::Outer,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", u32::from(self.aligned(z))),
                ("DROPOUT", u32::from(mask.is_some())),
                ("RT", tile as u32),
            ],
        )?;
        let mut part = self.alloc::<f32>("partial gradients", splits * padded * z.cols)?;
        let (rows, ldz, cols, ldq) = (
            z.rows as i64,
            z.stride as i64,
            z.cols as i32,
            q.stride as i32,
        );
        let (per_split, mask) = (rows_per_split as i64, mask.unwrap_or_default());
        let (z_at, _z) = z.data.device_ptr(self.stream);
        let (q_at, _q) = q.data.device_ptr(self.stream);
        let (part_at, part_guard) = part.device_ptr_mut(self.stream);
        let grid = Grid::new(
            [col_blocks as u32, splits as u32, (padded / tile) as u32],
            256,
        );
        let args = [
            arg(&z_at),
            arg(&q_at),
            arg(&part_at),
            arg(&rows),
            arg(&ldz),
            arg(&cols),
            arg(&ldq),
            arg(&per_split),
            arg(&mask),
        ];
        // SAFETY: arguments in the order of outer.cu; `z` passed `Rows::check`, `q` has as many rows,
        // padded, and `part` holds every split.
        unsafe { self.launch("launch of outer", &function, grid, &args) }?;
        drop(part_guard);
        Ok(Partial {
            part,
            splits,
            ranks: padded,
            cols: z.cols,
            made: 0..z.cols,
        })
    }
}

/// Partial sums of a gradient, one for each split of the rows: `[splits, ranks, cols]`, of the columns `made`.
pub(crate) struct Partial {
    pub part: CudaSlice<f32>,
    pub splits: usize,
    pub ranks: usize,
    pub cols: usize,
    pub made: Range<usize>,
}

/// Ranks that one block handles.
pub(crate) fn rank_tile(padded: usize) -> usize {
    padded.min(64)
}
