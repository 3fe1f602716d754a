//! Launchers of the one-pass kernels, whose narrow side is the rank.

use std::sync::Arc;

use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DeviceRepr,
    LaunchConfig, PushKernelArg,
};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::kernels::{Instance, Kernel, Kernels};

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

/// How [`Kernels::pack`] lays an adapter out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Ranks are rows: `[padded_rank, padded_width]`.
    RankRows,
    /// Ranks are columns: `[padded_width, padded_rank]`.
    RankCols,
}

/// The launch of one call, with its stream.
pub(crate) struct Launcher<'a> {
    pub kernels: &'a Kernels,
    pub stream: &'a Arc<CudaStream>,
}

impl Launcher<'_> {
    /// Uninitialized device memory.
    pub fn alloc<T: Element>(&self, what: &'static str, len: usize) -> Result<CudaSlice<T>> {
        if len == 0 {
            return self.stream.null().map_err(Error::driver("allocation"));
        }
        // SAFETY: every caller passes the memory to a kernel that writes all of it before it is read.
        unsafe { self.stream.alloc(len) }.map_err(Error::allocation(what, len * size_of::<T>()))
    }

    pub fn function(
        &self,
        kernel: Kernel,
        defines: Vec<(&'static str, u32)>,
    ) -> Result<CudaFunction> {
        self.kernels.function(Instance { kernel, defines }, 0)
    }

    /// `a[rank, width]` and `b[width, rank]` in `T`, padded with zeros, each laid out as asked.
    pub fn pack<T: Element, P: Element>(
        &self,
        (a, a_layout): (&CudaView<P>, Layout),
        (b, b_layout): (&CudaView<P>, Layout),
        rank: usize,
        (a_width, b_width): (usize, usize),
    ) -> Result<(CudaSlice<T>, CudaSlice<T>)> {
        let source_f32 = u32::from(P::DTYPE == DType::F32);
        let function = self.function(
            Kernel::Pack,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("SOURCE_F32", source_f32),
            ],
        )?;
        let shape = |rows: usize, cols: usize, width: usize, layout, transpose| {
            let (dst_rows, dst_cols) = match layout {
                Layout::RankRows => (padded_rank(rank), padded_width(width)),
                Layout::RankCols => (padded_width(width), padded_rank(rank)),
            };
            PackShape {
                rows: rows as i32,
                cols: cols as i32,
                dst_rows: dst_rows as i32,
                dst_cols: dst_cols as i32,
                transpose: i32::from(transpose),
            }
        };
        let a_shape = shape(
            rank,
            a_width,
            a_width,
            a_layout,
            a_layout == Layout::RankCols,
        );
        let b_shape = shape(
            b_width,
            rank,
            b_width,
            b_layout,
            b_layout == Layout::RankRows,
        );
        let mut a_dst = self.alloc("a packed adapter", a_shape.len())?;
        let mut b_dst = self.alloc("a packed adapter", b_shape.len())?;
        let blocks = a_shape.len().max(b_shape.len()).div_ceil(256).min(1024) as u32;
        let mut launch = self.stream.launch_builder(&function);
        launch
            .arg(a)
            .arg(&mut a_dst)
            .arg(&a_shape)
            .arg(b)
            .arg(&mut b_dst)
            .arg(&b_shape);
        // SAFETY: arguments in the order of pack.cu; sources were checked against rank and width,
        // destinations have the padded sizes of their shapes.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: (blocks, 2, 1),
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            })
        }
        .map_err(Error::driver("launch of pack"))?;
        Ok((a_dst, b_dst))
    }

    /// `s[rows, padded_rank] = alpha · D(x) aᵀ`, with `a` packed as [`Layout::RankRows`].
    pub fn shrink<T: Element>(
        &self,
        xs: &Rows<T>,
        a: &CudaSlice<T>,
        rank: usize,
        alpha: f32,
        mask: Option<Mask>,
    ) -> Result<CudaSlice<T>> {
        let padded = padded_rank(rank);
        let mut s = self.alloc("the rank-sized product", xs.rows * padded)?;
        if xs.rows == 0 {
            return Ok(s);
        }
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
        let (lda, lds, mask) = (
            padded_width(xs.cols) as i32,
            padded as i32,
            mask.unwrap_or_default(),
        );
        let grid = (
            xs.rows.div_ceil(16 * row_tiles) as u32,
            (padded / tile) as u32,
            1,
        );
        let mut launch = self.stream.launch_builder(&function);
        launch
            .arg(&xs.data)
            .arg(a)
            .arg(&mut s)
            .arg(&rows)
            .arg(&ldx)
            .arg(&cols)
            .arg(&lda)
            .arg(&lds)
            .arg(&alpha)
            .arg(&mask);
        // SAFETY: arguments in the order of shrink.cu; `xs` passed `Rows::check`, `a` is packed and
        // `s` has rows * padded_rank elements.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: grid,
                block_dim: (32 * warps as u32, 1, 1),
                shared_mem_bytes: 0,
            })
        }
        .map_err(Error::driver("launch of shrink"))?;
        Ok(s)
    }

    /// `out[rows, cols] = D(q pᵀ) + bias`, with `p` packed as [`Layout::RankCols`].
    pub fn expand<T: Element>(
        &self,
        (q, rows): (&CudaSlice<T>, usize),
        (p, cols): (&CudaSlice<T>, usize),
        rank: usize,
        bias: Option<&CudaView<T>>,
        mask: Option<Mask>,
    ) -> Result<CudaSlice<T>> {
        let mut out = self.alloc("the output", rows * cols)?;
        if rows == 0 {
            return Ok(out);
        }
        let aligned = cols.is_multiple_of(T::DTYPE.vector());
        let row_tiles = if rows >= 64 { 4 } else { 1 };
        let function = self.function(
            Kernel::Expand,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", u32::from(aligned)),
                ("DROPOUT", u32::from(mask.is_some())),
                ("MT", row_tiles as u32),
            ],
        )?;
        let blocks = rows.div_ceil(16 * row_tiles) * cols.div_ceil(8 * 4 * T::DTYPE.vector());
        let (rows, cols, rank) = (rows as i64, cols as i32, padded_rank(rank) as i32);
        let (with_bias, mask, null) = (i32::from(bias.is_some()), mask.unwrap_or_default(), 0_u64);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(q).arg(p);
        match bias {
            Some(bias) => launch.arg(bias),
            None => launch.arg(&null),
        };
        launch
            .arg(&mut out)
            .arg(&rows)
            .arg(&cols)
            .arg(&rank)
            .arg(&with_bias)
            .arg(&mask);
        // SAFETY: arguments in the order of expand.cu; `q` and `p` are padded, `bias` was checked to
        // have `cols` elements and `out` has rows * cols.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: (grid_x(blocks)?, 1, 1),
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            })
        }
        .map_err(Error::driver("launch of expand"))?;
        Ok(out)
    }

    /// Partial sums of `qᵀ D(z)`: `[splits, padded_rank, cols]`, to be added up by [`Self::reduce`].
    pub fn outer<T: Element>(
        &self,
        z: &Rows<T>,
        q: &CudaSlice<T>,
        rank: usize,
        mask: Option<Mask>,
    ) -> Result<Partial> {
        let padded = padded_rank(rank);
        if z.rows == 0 {
            return Ok(Partial {
                part: self.alloc("partial gradients", 0)?,
                splits: 0,
                cols: z.cols,
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
        let (rows, ldz, cols, ldq) = (z.rows as i64, z.stride as i64, z.cols as i32, padded as i32);
        let (per_split, mask) = (rows_per_split as i64, mask.unwrap_or_default());
        let grid = (col_blocks as u32, splits as u32, (padded / tile) as u32);
        let mut launch = self.stream.launch_builder(&function);
        launch
            .arg(&z.data)
            .arg(q)
            .arg(&mut part)
            .arg(&rows)
            .arg(&ldz)
            .arg(&cols)
            .arg(&ldq)
            .arg(&per_split)
            .arg(&mask);
        // SAFETY: arguments in the order of outer.cu; `z` passed `Rows::check`, `q` has as many rows,
        // padded, and `part` holds every split.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: grid,
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            })
        }
        .map_err(Error::driver("launch of outer"))?;
        Ok(Partial {
            part,
            splits,
            cols: z.cols,
        })
    }

    /// The gradients of A `[rank, in]` and B `[out, rank]` from their partial sums, written or added.
    pub fn reduce<T: Element, P: Element>(
        &self,
        (a, a_grad): (&Partial, &mut CudaViewMut<P>),
        (b, b_grad): (&Partial, &mut CudaViewMut<P>),
        rank: usize,
        accumulate: bool,
    ) -> Result<()> {
        let function = self.function(
            Kernel::Reduce,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("GRAD_F32", u32::from(P::DTYPE == DType::F32)),
                ("ACCUMULATE", u32::from(accumulate)),
            ],
        )?;
        let shape = |p: &Partial, transpose| ReduceShape {
            splits: p.splits as i32,
            padded_rank: padded_rank(rank) as i32,
            rank: rank as i32,
            cols: p.cols as i32,
            transpose,
        };
        let (a_shape, b_shape) = (shape(a, 0), shape(b, 1));
        let blocks = (rank * a.cols.max(b.cols)).div_ceil(256).min(1024) as u32;
        let mut launch = self.stream.launch_builder(&function);
        launch
            .arg(&a.part)
            .arg(a_grad)
            .arg(&a_shape)
            .arg(&b.part)
            .arg(b_grad)
            .arg(&b_shape);
        // SAFETY: arguments in the order of reduce.cu; the partial sums have the sizes of their shapes
        // and the gradients were checked to have rank * cols elements.
        unsafe {
            launch.launch(LaunchConfig {
                grid_dim: (blocks, 2, 1),
                block_dim: (256, 1, 1),
                shared_mem_bytes: 0,
            })
        }
        .map_err(Error::driver("launch of reduce"))?;
        Ok(())
    }

    /// Whether whole 16-byte vectors can be loaded from `rows`.
    pub fn aligned<T: Element>(&self, rows: &Rows<T>) -> bool {
        let vector = T::DTYPE.vector();
        self.address(&rows.data).is_multiple_of(16)
            && rows.stride.is_multiple_of(vector)
            && rows.cols.is_multiple_of(vector)
    }

    pub fn address<T>(&self, view: &CudaView<T>) -> u64 {
        view.device_ptr(self.stream).0
    }
}

/// Sums of `outer`, one for each split of the rows.
pub(crate) struct Partial {
    part: CudaSlice<f32>,
    splits: usize,
    cols: usize,
}

impl Partial {
    /// Sums that were not split.
    pub fn whole(part: CudaSlice<f32>, cols: usize) -> Self {
        Self {
            part,
            splits: 1,
            cols,
        }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PackShape {
    rows: i32,
    cols: i32,
    dst_rows: i32,
    dst_cols: i32,
    transpose: i32,
}

impl PackShape {
    fn len(&self) -> usize {
        self.dst_rows as usize * self.dst_cols as usize
    }
}

// SAFETY: plain words in the layout of `Shape` in pack.cu.
unsafe impl DeviceRepr for PackShape {}

#[derive(Clone, Copy)]
#[repr(C)]
struct ReduceShape {
    splits: i32,
    padded_rank: i32,
    rank: i32,
    cols: i32,
    transpose: i32,
}

// SAFETY: plain words in the layout of `Shape` in reduce.cu.
unsafe impl DeviceRepr for ReduceShape {}

/// Ranks that one block handles.
fn rank_tile(padded: usize) -> usize {
    padded.min(64)
}

fn grid_x(blocks: usize) -> Result<u32> {
    u32::try_from(blocks)
        .ok()
        .filter(|&b| b <= i32::MAX as u32)
        .ok_or_else(|| Error::Shape {
            what: "blocks of a launch",
            expected: "at most 2147483647".into(),
            found: blocks.to_string(),
        })
}
