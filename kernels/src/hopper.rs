//! Launcher of the Hopper kernel: base product, bias and adapter in one pass over the output.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::Result;
use crate::gemm::Product;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg};
use crate::masking::Masking;
use crate::path::{Path, Preference, Reason};
use crate::rows::{Rows, padded_width};
use crate::skinny::Partial;
use crate::tensor_map::TensorMap;

// As in gemm.cu.
const CLUSTER: usize = 2;
const TILE: usize = 256;
const DEPTH: usize = 64;
const STAGES: usize = 4;
const STORE_BYTES: usize = 8 * 2 * 16 * 64 * 2;
const SHARED_BYTES: usize = STAGES * (128 + 256) * DEPTH * 2 + STORE_BYTES;
const SIDE_BOX_ROWS: usize = 32;
/// A ring of boxes and the bits of their masks.
const SIDE_RING_BYTES: usize = 8 * 4 * (SIDE_BOX_ROWS * 64 * 2 + 512);

/// Multiplications of the tensor cores of the whole card while one block of side work reads a byte:
/// about 770 TFLOP/s against 48 GB/s, measured beside full tiles on an H200.
const FLOPS_PER_SIDE_BYTE: usize = 16_000;

/// The matrices of one call: `out = input · op(weight) + bias + D(q · p)`.
pub(crate) struct Fused<'a, T> {
    pub product: Product,
    pub input: &'a Rows<'a, T>,
    /// `[w_rows, w_cols]`
    pub weight: &'a CudaView<'a, T>,
    pub w_rows: usize,
    pub w_cols: usize,
    pub bias: Option<&'a CudaView<'a, T>>,
    /// `[rows, padded_rank]`
    pub q: &'a Rows<'a, T>,
    /// B as `[w_rows, rank]` forward, A as `[rank, w_cols]` backward; both padded.
    pub p: &'a CudaView<'a, T>,
    pub masking: Masking<'a>,
    /// Backward: partial sums to make beside the product.
    pub side: Option<SideWork<'a, T>>,
}

/// Partial sums of the adapter's gradients, for the blocks that the tiles leave over.
pub(crate) struct SideWork<'a, T> {
    /// `S` of the forward `[rows, padded_rank]`, for the gradient of B.
    pub b: Option<&'a Rows<'a, T>>,
    /// The input of the layer and `dS`, for the gradient of A; masked like the output.
    pub a: Option<(&'a Rows<'a, T>, &'a Rows<'a, T>)>,
    /// How many blocks.
    pub blocks: usize,
}

/// Partial sums of the adapter's gradients that were made beside a product.
#[derive(Default)]
pub(crate) struct Parts {
    pub a: Option<Partial>,
    pub b: Option<Partial>,
}

impl Launcher<'_> {
    /// The path for `op(weight)[w_rows, w_cols]` on `input`.
    pub fn path<T: Element>(
        &self,
        product: Product,
        input: &Rows<T>,
        (weight, w_rows, w_cols): (&CudaView<T>, usize, usize),
        rank: usize,
        mask: Option<Mask>,
    ) -> Path {
        let reason = if self.kernels.preference() == Preference::General {
            Reason::Preference
        } else if self.kernels.arch() != "sm_90a" {
            Reason::Architecture
        } else if T::DTYPE == DType::F32 {
            Reason::DType
        } else if !self.aligned(input)
            || !w_rows.is_multiple_of(8)
            || !w_cols.is_multiple_of(8)
            || !self.address(weight).is_multiple_of(16)
        {
            Reason::Alignment
        } else if mask.is_some() && rank > DEPTH {
            Reason::DropoutRank
        } else if self.kernels.preference() == Preference::Fastest
            && !self.fills(product, input.rows, w_rows, w_cols)
        {
            Reason::FewTiles
        } else {
            return Path::Hopper;
        };
        Path::General(reason)
    }

    /// Whether at least three quarters of the card work, waves rounded up.
    fn fills(&self, product: Product, rows: usize, w_rows: usize, w_cols: usize) -> bool {
        let cols = if product == Product::Forward {
            w_rows
        } else {
            w_cols
        };
        let tiles = rows.div_ceil(TILE) * cols.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let useful = rows * cols; // of the area that whole waves of tiles cover
        4 * useful >= 3 * clusters * tiles.div_ceil(clusters) * TILE * TILE
    }

    /// Which of the gradients of the adapter the blocks that the tiles of `dx [rows, w_cols]` leave
    /// over can make in the same time: those of B, given `S`, and of A, given the input and `dS`.
    pub fn side_work<'a, T: Element>(
        &self,
        dys: &Rows<T>,
        w_cols: usize,
        b: Option<&'a Rows<'a, T>>,
        a: Option<(&'a Rows<'a, T>, &'a Rows<'a, T>)>,
    ) -> Option<SideWork<'a, T>> {
        let w_rows = dys.cols;
        let tiles = dys.rows.div_ceil(TILE) * w_cols.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let ranks = b.or(a.map(|(_, ds)| ds)).map_or(usize::MAX, |q| q.cols);
        if tiles < clusters || ranks > 32 {
            return None;
        }
        let busy = tiles.div_ceil(tiles.div_ceil(clusters));
        let blocks = CLUSTER * (clusters - busy);
        let mut time = blocks * w_rows * w_cols / FLOPS_PER_SIDE_BYTE;
        let mut take = |width: usize| {
            let fits = width <= time;
            time -= if fits { width } else { 0 };
            fits
        };
        let b = b.filter(|_| take(w_rows));
        let a = a.filter(|(xs, _)| self.aligned(xs) && take(w_cols));
        (a.is_some() || b.is_some()).then_some(SideWork { b, a, blocks })
    }

    /// One pass over the output. [`Self::path`] must have chosen [`Path::Hopper`].
    pub fn fused<T: Element>(&self, call: Fused<T>, out: &mut CudaSlice<T>) -> Result<Parts> {
        let Fused {
            product,
            input,
            weight,
            w_rows,
            w_cols,
            bias,
            q,
            p,
            masking,
            side,
        } = call;
        let forward = product == Product::Forward;
        let (depth, cols) = if forward {
            (w_cols, w_rows)
        } else {
            (w_rows, w_cols)
        };
        let rank = q.cols;
        let rows = input.rows;
        if rows == 0 {
            return Ok(Parts::default());
        }
        let side_blocks = side.as_ref().map_or(0, |side| side.blocks);
        let instance = Instance {
            kernel: Kernel::Gemm,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("BACKWARD", u32::from(!forward)),
                ("DROPOUT", masking.define()),
                ("RANK_STEPS", ((rank - 1) % DEPTH / 16 + 1) as u32),
                ("SIDE", u32::from(side_blocks > 0)),
            ],
        };
        let function = self.kernels.function(instance, SHARED_BYTES)?;

        let (input_at, _input) = input.data.device_ptr(self.stream);
        let (weight_at, _weight) = weight.device_ptr(self.stream);
        let (q_at, _q) = q.data.device_ptr(self.stream);
        let (p_at, _p) = p.device_ptr(self.stream);
        let box_rows = if forward { 128 } else { DEPTH };
        let map = |at, rows, cols, stride, box_rows| {
            TensorMap::new::<T>(at, (rows, cols, stride), box_rows)
        };
        let input_map = map(input_at, rows, depth, input.stride, 128)?;
        let weight_map = map(weight_at, w_rows, w_cols, w_cols, box_rows)?;
        let q_map = map(q_at, rows, rank, q.stride, 128)?;
        let p_map = if forward {
            map(p_at, cols, rank, rank, 128)?
        } else {
            map(p_at, rank, cols, padded_width(cols), DEPTH)?
        };
        let (out_at, out_guard) = out.device_ptr_mut(self.stream);
        let out_map = map(out_at, rows, cols, cols, 16)?;

        let tiles = rows.div_ceil(TILE) * cols.div_ceil(TILE);
        let tile_blocks =
            CLUSTER * tiles.min((self.kernels.multiprocessors() - side_blocks) / CLUSTER);
        let blocks = tile_blocks + side_blocks;
        let side_a = side.as_ref().and_then(|side| side.a);
        let side_b = side.as_ref().and_then(|side| side.b);
        let (b_cols, a_cols) = (
            side_b.map_or(0, |_| depth),
            side_a.map_or(0, |(xs, _)| xs.cols),
        );
        // Segments of rows whose q fits, as many for each block.
        let most = (SHARED_BYTES - SIDE_RING_BYTES) / (2 * rank) / SIDE_BOX_ROWS * SIDE_BOX_ROWS;
        let shares = side_blocks.max(1);
        let segment_rows = rows
            .div_ceil(shares * rows.div_ceil(shares * most))
            .next_multiple_of(SIDE_BOX_ROWS);
        let segments = rows.div_ceil(segment_rows);
        let mut b_part = self.alloc::<f32>("partial gradients", segments * rank * b_cols)?;
        let mut a_part = self.alloc::<f32>("partial gradients", segments * rank * a_cols)?;
        let (b_at, b_guard) = b_part.device_ptr_mut(self.stream);
        let (a_at, a_guard) = a_part.device_ptr_mut(self.stream);
        let s_ptr = side_b.map(|s| s.data.device_ptr(self.stream));
        let ds_ptr = side_a.map(|(xs, ds)| {
            (
                xs.data.device_ptr(self.stream),
                ds.data.device_ptr(self.stream),
            )
        });
        let side0_map = map(input_at, rows, depth, input.stride, SIDE_BOX_ROWS)?;
        let side1_map = match (side_a, &ds_ptr) {
            (Some((xs, _)), Some(((at, _), _))) => {
                map(*at, rows, xs.cols, xs.stride, SIDE_BOX_ROWS)?
            }
            _ => side0_map,
        };
        let side_job = Side {
            q: [
                s_ptr.as_ref().map_or(0, |p| p.0),
                ds_ptr.as_ref().map_or(0, |(_, p)| p.0),
            ],
            part: [b_at, a_at],
            strides: [
                side_b.map_or(0, |s| s.stride as i32),
                side_a.map_or(0, |(_, ds)| ds.stride as i32),
            ],
            cols: [b_cols as i32, a_cols as i32],
            segment_rows: segment_rows as i32,
            blocks: side_blocks as i32,
        };
        let (rows, cols, depth, rank) = (rows as i32, cols as i32, depth as i32, rank as i32);
        let mask = masking.mask().unwrap_or_default();
        let bits_at = self.bits_address(masking);
        let bias = bias.map(|bias| bias.device_ptr(self.stream));
        let bias_at = bias.as_ref().map_or(0, |(at, _)| *at);
        let args = [
            arg(&input_map),
            arg(&weight_map),
            arg(&q_map),
            arg(&p_map),
            arg(&out_map),
            arg(&side0_map),
            arg(&side1_map),
            arg(&bias_at),
            arg(&rows),
            arg(&cols),
            arg(&depth),
            arg(&rank),
            arg(&mask),
            arg(&bits_at),
            arg(&side_job),
        ];
        let grid = Grid {
            shared_bytes: SHARED_BYTES,
            ..Grid::new([blocks as u32, 1, 1], 384)
        };
        // SAFETY: arguments in the order of gemm.cu; the maps clip loads and stores to the matrices,
        // whose sizes the caller checked, and the guards above order the stream after their writers.
        unsafe { self.launch("launch of gemm", &function, grid, &args) }?;
        drop((out_guard, a_guard, b_guard));
        let partial = |part, cols| Partial {
            part,
            splits: segments,
            ranks: q.cols,
            cols,
        };
        let a = (a_cols > 0).then(|| partial(a_part, a_cols));
        let b = (b_cols > 0).then(|| partial(b_part, b_cols));
        Ok(Parts { a, b })
    }
}

/// Work beside the tiles, laid out as in gemm.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Side {
    q: [u64; 2],
    part: [u64; 2],
    strides: [i32; 2],
    cols: [i32; 2],
    segment_rows: i32,
    blocks: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for Side {}
