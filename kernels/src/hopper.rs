//! Launcher of the Hopper kernel: base product, bias and adapter in one pass over the output.

use std::ptr;

use cudarc::driver::sys::{
    CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
    cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::gemm::Product;
use crate::kernels::{Instance, Kernel};
use crate::path::{Path, Preference, Reason};
use crate::skinny::{Launcher, Partial, Rows, padded_rank, padded_width};

// As in gemm.cu.
const CLUSTER: usize = 2;
const TILE: usize = 256;
const DEPTH: usize = 64;
const STAGES: usize = 4;
const SHARED_BYTES: usize = STAGES * (128 + 256) * DEPTH * 2 + 4 * 64 * 64 * 2;

/// Blocks times width of the output from which on the side work takes no longer than the tiles: a
/// multiprocessor reads at least 55 GB/s, and tiles of depth N run at about 790 TFLOP/s on the card.
const SIDE_WIDTH: usize = 14_000;

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
    pub q: &'a CudaSlice<T>,
    /// B as `[w_rows, rank]` forward, A as `[rank, w_cols]` backward; both padded.
    pub p: &'a CudaSlice<T>,
    pub rank: usize,
    pub mask: Option<Mask>,
    /// Backward: `S` of the forward, for partial sums of `inputᵀ S` by the blocks that have no tile.
    pub side: Option<&'a CudaSlice<T>>,
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
        } else if !self.aligned(input) || w_rows % 8 != 0 || w_cols % 8 != 0 || self.address(weight) % 16 != 0 {
            Reason::Alignment
        } else if mask.is_some() && rank > DEPTH {
            Reason::DropoutRank
        } else if self.kernels.preference() == Preference::Fastest && !self.fills(product, input.rows, w_rows, w_cols) {
            Reason::FewTiles
        } else {
            return Path::Hopper;
        };
        Path::General(reason)
    }

    /// Whether at least three quarters of the card work, waves rounded up.
    fn fills(&self, product: Product, rows: usize, w_rows: usize, w_cols: usize) -> bool {
        let cols = if product == Product::Forward { w_rows } else { w_cols };
        let tiles = rows.div_ceil(TILE) * cols.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let useful = rows * cols; // of the area that whole waves of tiles cover
        4 * useful >= 3 * clusters * tiles.div_ceil(clusters) * TILE * TILE
    }

    /// Blocks that the tiles of the gradient of the input leave over, if they can make the partial
    /// sums of B's gradient in the same time.
    pub fn side_blocks(&self, rows: usize, (w_rows, w_cols): (usize, usize), rank: usize) -> usize {
        let tiles = rows.div_ceil(TILE) * w_cols.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let busy = tiles.div_ceil(tiles.div_ceil(clusters).max(1));
        let blocks = CLUSTER * (clusters - busy);
        let in_time = blocks * w_cols >= SIDE_WIDTH && tiles >= clusters;
        if in_time && padded_rank(rank) <= 32 && w_rows > 0 { blocks } else { 0 }
    }

    /// One pass over the output. [`Self::path`] must have chosen [`Path::Hopper`].
    pub fn fused<T: Element>(&self, call: Fused<T>) -> Result<(CudaSlice<T>, Option<Partial>)> {
        let Fused { product, input, weight, w_rows, w_cols, bias, q, p, rank, mask, side } = call;
        let forward = product == Product::Forward;
        let (depth, cols) = if forward { (w_cols, w_rows) } else { (w_rows, w_cols) };
        let rank = padded_rank(rank);
        let rows = input.rows;
        let mut out = self.alloc("the output", rows * cols)?;
        if rows == 0 {
            return Ok((out, None));
        }
        let side_blocks = if side.is_some() { self.side_blocks(rows, (w_rows, w_cols), rank) } else { 0 };
        let instance = Instance {
            kernel: Kernel::Gemm,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("BACKWARD", u32::from(!forward)),
                ("DROPOUT", u32::from(mask.is_some())),
                ("RANK_STEPS", ((rank - 1) % DEPTH / 16 + 1) as u32),
                ("SIDE", u32::from(side_blocks > 0)),
            ],
        };
        let function = self.kernels.function(instance, SHARED_BYTES)?;

        let (input_at, _input) = input.data.device_ptr(self.stream);
        let (weight_at, _weight) = weight.device_ptr(self.stream);
        let (q_at, _q) = q.device_ptr(self.stream);
        let (p_at, _p) = p.device_ptr(self.stream);
        let box_rows = if forward { 128 } else { DEPTH };
        let map = |at, rows, cols, stride, box_rows| TensorMap::new::<T>(at, (rows, cols, stride), box_rows);
        let input_map = map(input_at, rows, depth, input.stride, 128)?;
        let weight_map = map(weight_at, w_rows, w_cols, w_cols, box_rows)?;
        let q_map = map(q_at, rows, rank, rank, 128)?;
        let p_map = if forward { map(p_at, cols, rank, rank, 128)? } else { map(p_at, rank, cols, padded_width(cols), DEPTH)? };
        let (out_at, out_guard) = out.device_ptr_mut(self.stream);
        let out_map = map(out_at, rows, cols, cols, 64)?;

        let tiles = rows.div_ceil(TILE) * cols.div_ceil(TILE);
        let tile_blocks = CLUSTER * tiles.min((self.kernels.multiprocessors() - side_blocks) / CLUSTER);
        let blocks = tile_blocks + side_blocks;
        let mut part = self.alloc::<f32>("partial gradients", if side_blocks > 0 { rank * depth } else { 0 })?;
        let (part_at, part_guard) = part.device_ptr_mut(self.stream);
        let (side_at, _side) = side.map_or((0, None), |s| {
            let (at, guard) = s.device_ptr(self.stream);
            (at, Some(guard))
        });
        let side_job =
            Side { input: input_at, q: side_at, part: part_at, ld: input.stride as i64, blocks: side_blocks as i64 };
        let (rows, cols, depth, rank) = (rows as i32, cols as i32, depth as i32, rank as i32);
        let (mask, null) = (mask.unwrap_or_default(), 0_u64);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&input_map).arg(&weight_map).arg(&q_map).arg(&p_map).arg(&out_map);
        match bias {
            Some(bias) => launch.arg(bias),
            None => launch.arg(&null),
        };
        launch.arg(&rows).arg(&cols).arg(&depth).arg(&rank).arg(&mask).arg(&side_job);
        let config =
            LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (384, 1, 1), shared_mem_bytes: SHARED_BYTES as u32 };
        // SAFETY: arguments in the order of gemm.cu; the maps clip loads and stores to the matrices,
        // whose sizes the caller checked, and the guards above order the stream after their writers.
        unsafe { launch.launch(config) }.map_err(Error::driver("launch of gemm"))?;
        drop((out_guard, part_guard));
        let partial = (side_blocks > 0).then(|| Partial::whole(part, depth as usize));
        Ok((out, partial))
    }
}

/// Work beside the tiles, laid out as in gemm.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Side {
    input: u64,
    q: u64,
    part: u64,
    ld: i64,
    blocks: i64,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for Side {}

/// A description of a matrix for the copy engine, passed to kernels by value.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct TensorMap([u64; 16]);

// SAFETY: plain words, the layout that the driver wrote.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// `[rows, cols]` at `address`, rows `stride` elements apart, in swizzled boxes of 64 columns.
    fn new<T: Element>(address: u64, (rows, cols, stride): (usize, usize, usize), box_rows: usize) -> Result<Self> {
        let mut map = Self([0; 16]);
        let dtype = match T::DTYPE {
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let (sizes, strides) = ([cols as u64, rows as u64], [(stride * size_of::<T>()) as u64]);
        let (box_size, steps) = ([DEPTH as u32, box_rows as u32], [1, 1]);
        // SAFETY: the arrays have two, one, two and two elements, as rank 2 asks for; `map` is 128 bytes
        // aligned to 128 and only written.
        unsafe {
            cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                dtype,
                2,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_size.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(Error::driver("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}
