//! Launcher of the Hopper kernel: base product, bias and adapter in one pass over the output.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::dropout::Mask;
use crate::element::{DType, Element};
use crate::error::Result;
use crate::gemm::Product;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg};
use crate::low::{Low, Tiling};
use crate::masking::Masking;
use crate::path::{Path, Preference, Reason};
use crate::rows::{Rows, padded_width};
use crate::side::{self, Around, Pace, Parts, SideArg, SideLaunch, SideWork};
use crate::tensor_map::TensorMap;

// As in gemm.cu.
pub(crate) const CLUSTER: usize = 2;
pub(crate) const TILE: usize = 256;
pub(crate) const DEPTH: usize = 64;
/// Microseconds that a tile takes for a step of the depth.
pub(crate) const STEP_MICROS: f64 = 0.7;
/// Rows of clusters that are walked together.
pub(crate) const GROUP: usize = 8;
const STAGES: usize = 4;
const STORE_BYTES: usize = 8 * 2 * 16 * 64 * 2;
pub(crate) const SHARED_BYTES: usize = STAGES * (128 + 256) * DEPTH * 2 + STORE_BYTES;
const THREADS: u32 = 384;

/// The matrices of one call: `out = input · op(weight) + bias + D(q · p)`.
pub(crate) struct Fused<'a, T> {
    pub product: Product,
    pub input: &'a Rows<'a, T>,
    /// `[w_rows, w_cols]`
    pub weight: &'a CudaView<'a, T>,
    pub w_rows: usize,
    pub w_cols: usize,
    pub bias: Option<&'a CudaView<'a, T>>,
    pub q: Low<'a, T>,
    /// B as `[w_rows, rank]` forward, A as `[rank, w_cols]` backward; both padded.
    pub p: &'a CudaView<'a, T>,
    pub masking: Masking<'a>,
    /// Backward: gradients to make beside the product.
    pub side: Option<SideWork<'a, T>>,
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

    /// One pass over the output. [`Self::path`] must have chosen [`Path::Hopper`]. The `flags` are zero,
    /// and there where the launch makes `q` or has side work. Returns what side work leaves to be added up.
    pub fn fused<T: Element>(
        &self,
        call: Fused<T>,
        flags: Option<&mut CudaViewMut<u32>>,
        out: &mut CudaSlice<T>,
    ) -> Result<Parts> {
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
        let rows = input.rows;
        if rows == 0 {
            return Ok(Parts::default());
        }
        let (rank, down) = (q.ranks(), q.define());
        let has_side = side.is_some();
        let instance = |with_tail: bool| Instance {
            kernel: Kernel::Gemm,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("BACKWARD", u32::from(!forward)),
                ("DROPOUT", masking.define()),
                ("RANK_STEPS", ((rank - 1) % DEPTH / 16 + 1) as u32),
                ("DOWN", down),
                ("SIDE", u32::from(has_side)),
                ("TAIL", u32::from(with_tail)),
            ],
        };
        // Whether there is a tail depends on the clusters that the card holds, of which this one is asked.
        let mut function = self.kernels.function(instance(false), SHARED_BYTES)?;

        let (cluster_rows, cluster_cols) = (rows.div_ceil(TILE), cols.div_ceil(TILE));
        let tiles = cluster_rows * cluster_cols;
        let all = Grid {
            shared_bytes: SHARED_BYTES,
            cluster: Some(CLUSTER as u32),
            ..Grid::new([CLUSTER as u32, 1, 1], THREADS)
        };
        let clusters = self
            .kernels
            .clusters(&instance(false), CLUSTER as u32, || {
                self.active_clusters(&function, all)
            })?;
        let tiling = |busy| Tiling {
            product,
            rows: cluster_rows,
            cols: cluster_cols,
            busy,
            spare: CLUSTER * (clusters - busy),
        };
        let whole = tiling(side::busy(tiles, clusters));
        let made = down > 0;
        let tail = (made && forward).then(|| self.tail(depth, whole)).flatten();
        if tail.is_some() {
            function = self.kernels.function(instance(true), SHARED_BYTES)?;
        }
        let tiling = tail.map_or(whole, |_| tiling(clusters));
        let busy = tiling.busy;
        let grid_clusters = if has_side { clusters } else { busy };

        let (input_at, _input) = input.data.device_ptr(self.stream);
        let (weight_at, _weight) = weight.device_ptr(self.stream);
        let (p_at, _p) = p.device_ptr(self.stream);
        let box_rows = if forward { 128 } else { DEPTH };
        let map = |at, rows, cols, stride, box_rows| {
            TensorMap::new::<T>(at, (rows, cols, stride), box_rows)
        };
        let input_map = map(input_at, rows, depth, input.stride, 128)?;
        let weight_map = map(weight_at, w_rows, w_cols, w_cols, box_rows)?;
        let p_map = if forward {
            map(p_at, cols, rank, rank, 128)?
        } else {
            map(p_at, rank, cols, padded_width(cols), DEPTH)?
        };
        let (out_at, _out) = out.device_ptr_mut(self.stream);
        let out_map = map(out_at, rows, cols, cols, 16)?;

        let low = self.low(q, depth, tiling)?;
        let q_map = map(low.q_at, rows, rank, low.q_stride, 128)?;
        let down_map = low.down_map.unwrap_or(p_map);

        let around = Around {
            input,
            weight: (w_rows, w_cols),
            q: (low.q_at, low.q_stride),
            pace: Pace {
                ranks: rank,
                masked: matches!(masking, Masking::Read(_)),
            },
            blocks: CLUSTER * grid_clusters,
            spare: tiling.spare,
        };
        let side = side.as_ref();
        let beside = side
            .map(|work| self.side_launch(work, around))
            .transpose()?;
        let (side_arg, side_maps) = beside
            .as_ref()
            .map_or((SideArg::default(), [input_map; 2]), |beside| {
                (beside.arg, beside.maps)
            });
        let tail_launch = self.tail_launch(tail, tiles)?;
        let flags = flags.map(|flags| flags.device_ptr_mut(self.stream));
        let flags_job = FlagsArg {
            words: flags.as_ref().map_or(0, |(at, _)| *at),
            cluster_rows: cluster_rows as i32,
            padding: 0,
        };
        let (rows, cols, depth, rank) = (rows as i32, cols as i32, depth as i32, rank as i32);
        let busy = busy as i32;
        let mask = low.mask.or(masking.mask()).unwrap_or_default();
        let bits_at = self.bits_address(masking);
        let bias = bias.map(|bias| bias.device_ptr(self.stream));
        let bias_at = bias.as_ref().map_or(0, |(at, _)| *at);
        let args = [
            arg(&input_map),
            arg(&weight_map),
            arg(&q_map),
            arg(&p_map),
            arg(&out_map),
            arg(&down_map),
            arg(&side_maps[0]),
            arg(&side_maps[1]),
            arg(&bias_at),
            arg(&rows),
            arg(&cols),
            arg(&depth),
            arg(&rank),
            arg(&busy),
            arg(&mask),
            arg(&bits_at),
            arg(&flags_job),
            arg(&low.down),
            arg(&side_arg),
            arg(&tail_launch.arg),
        ];
        let grid = Grid {
            shared_bytes: SHARED_BYTES,
            waits: made,
            ..Grid::new([(CLUSTER * grid_clusters) as u32, 1, 1], THREADS)
        };
        // SAFETY: arguments in the order of gemm.cu; the maps clip loads and stores to the matrices,
        // whose sizes the caller checked, and the guards above order the stream after their writers.
        unsafe { self.launch("launch of gemm", &function, grid, &args) }?;
        Ok(beside.map_or_else(Parts::default, SideLaunch::into_parts))
    }
}

/// Laid out as in flags.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct FlagsArg {
    words: u64,
    cluster_rows: i32,
    padding: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Flags`.
unsafe impl DeviceRepr for FlagsArg {}
