//! Launcher of the Hopper kernel: base product, bias and adapter in one pass over the output.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

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
use crate::sweep;
use crate::tensor_map::TensorMap;

// As in gemm.cu.
const CLUSTER: usize = 2;
pub(crate) const TILE: usize = 256;
const DEPTH: usize = 64;
const STAGES: usize = 4;
const STORE_BYTES: usize = 8 * 2 * 16 * 64 * 2;
const SHARED_BYTES: usize = STAGES * (128 + 256) * DEPTH * 2 + STORE_BYTES;
const SIDE_BOX_ROWS: usize = 32;
const SIDE_CHUNK: usize = 512;
/// Rings of boxes and the bits of their masks.
const SIDE_RING_BYTES: usize = 8 * 4 * (SIDE_BOX_ROWS * 64 * 2 + 512);
const THREADS: u32 = 384;

/// Most ranks that a launch can make the rank-sized product of, or gradients of the adapter beside.
pub(crate) const MOST_MADE: usize = 64;

/// Multiplications of the tensor cores of the whole card while one block of side work reads a byte:
/// about 770 TFLOP/s against 48 GB/s, measured beside full tiles on an H200.
const FLOPS_PER_SIDE_BYTE: usize = 16_000;
/// Microseconds that making S and dS adds to a product, measured on an H200; in backward with what it
/// takes until the side work of all blocks is under way.
const MAKING_FORWARD: f64 = 12.0;
const MAKING_BACKWARD: f64 = 20.0;
/// Microseconds of a pass besides the reading.
const SHRINK_START: f64 = 5.0;
const SWEEP_START: f64 = 8.0;

/// Tiles of a row that share the depth of its rank-sized product: more would exchange too much.
const MOST_SHARES: usize = 8;
/// Input that stays in the L2 cache, in bytes.
const CACHED: usize = 24 << 20;
/// Steps of the depth until the adapter is packed, about 3 µs.
const PACKING_STEPS: usize = 4;
/// Steps of the depth that the exchange of the shares takes, about 5 µs.
const EXCHANGE_STEPS: usize = 8;

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
    /// Backward: partial sums to make beside the product.
    pub side: Option<SideWork<'a, T>>,
}

/// The rank-sized factor `q [rows, padded_rank]` of the adapter's part.
pub(crate) enum Low<'a, T> {
    Given(&'a Rows<'a, T>),
    Made(Made<'a, T>),
}

/// `into = scale · input downᵀ`, made by the launch that reads the input; at most [`MOST_MADE`] ranks.
pub(crate) struct Made<'a, T> {
    /// `[padded_rank, padded depth]`
    pub down: &'a CudaView<'a, T>,
    pub ranks: usize,
    pub scale: f32,
    /// `[rows, padded_rank]`
    pub into: &'a mut CudaSlice<T>,
}

/// Partial sums of the adapter's gradients, of at most [`MOST_MADE`] ranks.
pub(crate) struct SideWork<'a, T> {
    /// `S` of the forward `[rows, padded_rank]`, for the gradient of B.
    pub b: Option<&'a Rows<'a, T>>,
    /// The input of the layer, for the gradient of A, whose other factor is `q`; masked like the output.
    pub a: Option<&'a Rows<'a, T>>,
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

    /// Whether S of `xs` costs less made by the product's first tiles than by a pass of its own.
    pub fn makes_forward<T>(&self, xs: &Rows<T>, ranks: usize) -> bool {
        if self.kernels.preference() == Preference::Hopper {
            return ranks <= MOST_MADE;
        }
        let pass = SHRINK_START + micros(xs.rows, xs.cols) * (ranks as f64 / 16.0).sqrt();
        ranks <= MOST_MADE && pass > MAKING_FORWARD
    }

    /// Whether dS is better made by the product's first tiles, and both gradients of the adapter beside,
    /// than dS and the gradient of B in one pass over `dys` before.
    pub fn makes_backward<T>(&self, dys: &Rows<T>, in_features: usize, ranks: usize) -> bool {
        if self.kernels.preference() == Preference::Hopper {
            return ranks <= MOST_MADE;
        }
        let (rows, out_features) = (dys.rows, dys.cols);
        let tiles = rows.div_ceil(TILE) * in_features.div_ceil(TILE);
        let clusters = self.kernels.multiprocessors() / CLUSTER;
        let spare = CLUSTER * (clusters - busy(tiles, clusters).min(clusters));
        // Columns that the clusters without tiles read meanwhile; the rest waits for the tiles.
        let beside = beside(spare, out_features, in_features);
        let rest = |width: usize| micros(rows, width.saturating_sub(beside));
        let made = MAKING_BACKWARD + rest(out_features + in_features);
        let swept = SWEEP_START + micros(rows, out_features) + rest(in_features);
        ranks <= MOST_MADE && (ranks > sweep::both(false) || made < swept)
    }

    /// One pass over the output. [`Self::path`] must have chosen [`Path::Hopper`]. The `flags` are zero,
    /// and there where the launch makes `q` or has side work.
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
        let (rank, down_define) = match &q {
            Low::Given(q) => (q.cols, 0),
            Low::Made(made) => (made.ranks, 1),
        };
        let side_a = side.as_ref().and_then(|side| side.a);
        let side_b = side.as_ref().and_then(|side| side.b);
        let has_side = side_a.is_some() || side_b.is_some();
        let instance = Instance {
            kernel: Kernel::Gemm,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("BACKWARD", u32::from(!forward)),
                ("DROPOUT", masking.define()),
                ("RANK_STEPS", ((rank - 1) % DEPTH / 16 + 1) as u32),
                ("DOWN", down_define),
                ("SIDE", u32::from(has_side)),
            ],
        };
        let function = self.kernels.function(instance.clone(), SHARED_BYTES)?;

        let (cluster_rows, cluster_cols) = (rows.div_ceil(TILE), cols.div_ceil(TILE));
        let tiles = cluster_rows * cluster_cols;
        let whole = Grid {
            shared_bytes: SHARED_BYTES,
            cluster: Some(CLUSTER as u32),
            ..Grid::new([CLUSTER as u32, 1, 1], THREADS)
        };
        let clusters = self.kernels.clusters(&instance, CLUSTER as u32, || {
            self.active_clusters(&function, whole)
        })?;
        let busy = if has_side {
            busy(tiles, clusters)
        } else {
            tiles.min(clusters)
        };
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
        let (out_at, out_guard) = out.device_ptr_mut(self.stream);
        let out_map = map(out_at, rows, cols, cols, 16)?;

        let mut down = DownArg::default();
        let mut down_map = p_map;
        let mut partial = None;
        let (given, made) = match q {
            Low::Given(q) => (Some((q.data.device_ptr(self.stream), q.stride)), None),
            Low::Made(made) => {
                let input_bytes = rows * depth * size_of::<T>();
                let shares = shares(
                    busy,
                    (cluster_rows, cluster_cols),
                    depth.div_ceil(DEPTH),
                    input_bytes,
                    if forward { PACKING_STEPS } else { 0 },
                );
                if shares.count > 1 {
                    let len = shares.count * cluster_rows * TILE * rank;
                    partial = Some(self.alloc::<f32>("partial rank-sized products", len)?);
                }
                let (at, _down) = made.down.device_ptr(self.stream);
                down_map = map(at, rank, depth, padded_width(depth), rank)?;
                down = DownArg {
                    shares: shares.count as i32,
                    window: shares.window as i32,
                    delay: shares.delay as i32,
                    scale: made.scale,
                    ..down
                };
                (None, Some(made.into.device_ptr_mut(self.stream)))
            }
        };
        let partial = partial.as_mut().map(|p| p.device_ptr_mut(self.stream));
        let (q_at, q_stride) = match (&given, &made) {
            (Some(((at, _), stride)), _) => (*at, *stride),
            (None, made) => (made.as_ref().map_or(0, |made| made.0), rank),
        };
        down.q = q_at;
        down.partial = partial.as_ref().map_or(0, |partial| partial.0);
        let q_map = map(q_at, rows, rank, q_stride, 128)?;

        let (b_cols, a_cols) = (side_b.map_or(0, |_| depth), side_a.map_or(0, |xs| xs.cols));
        let spare = CLUSTER * (grid_clusters - busy);
        let fits = b_cols + a_cols <= beside(spare, w_rows, w_cols);
        let chunks = b_cols.div_ceil(SIDE_CHUNK) + a_cols.div_ceil(SIDE_CHUNK);
        // One for each block that has the time, or enough for all blocks to be done at once.
        let (units, split) = if fits {
            (spare, 1)
        } else {
            (4 * CLUSTER * clusters, chunks)
        };
        let segment_rows = segment_rows(rows, rank, units, split);
        let segments = rows.div_ceil(segment_rows);
        let mut b_part = self.alloc::<f32>("partial gradients", segments * rank * b_cols)?;
        let mut a_part = self.alloc::<f32>("partial gradients", segments * rank * a_cols)?;
        let (b_at, b_guard) = b_part.device_ptr_mut(self.stream);
        let (a_at, a_guard) = a_part.device_ptr_mut(self.stream);
        let s_ptr = side_b.map(|s| s.data.device_ptr(self.stream));
        let xs_ptr = side_a.map(|xs| xs.data.device_ptr(self.stream));
        let side0_map = map(input_at, rows, depth, input.stride, SIDE_BOX_ROWS)?;
        let side1_map = match (side_a, &xs_ptr) {
            (Some(xs), Some((at, _))) => map(*at, rows, xs.cols, xs.stride, SIDE_BOX_ROWS)?,
            _ => side0_map,
        };
        let side_job = Side {
            q: [s_ptr.as_ref().map_or(0, |p| p.0), q_at],
            part: [b_at, a_at],
            strides: [side_b.map_or(0, |s| s.stride as i32), q_stride as i32],
            cols: [b_cols as i32, a_cols as i32],
            segment_rows: segment_rows as i32,
            all: i32::from(!fits),
        };
        let flags = flags.map(|flags| flags.device_ptr_mut(self.stream));
        let flags_job = FlagsArg {
            words: flags.as_ref().map_or(0, |(at, _)| *at),
            cluster_rows: cluster_rows as i32,
            padding: 0,
        };
        let (rows, cols, depth, rank) = (rows as i32, cols as i32, depth as i32, rank as i32);
        let busy = busy as i32;
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
            arg(&down_map),
            arg(&side0_map),
            arg(&side1_map),
            arg(&bias_at),
            arg(&rows),
            arg(&cols),
            arg(&depth),
            arg(&rank),
            arg(&busy),
            arg(&mask),
            arg(&bits_at),
            arg(&flags_job),
            arg(&down),
            arg(&side_job),
        ];
        let grid = Grid {
            shared_bytes: SHARED_BYTES,
            cooperative: made.is_some(),
            ..Grid::new([(CLUSTER * grid_clusters) as u32, 1, 1], THREADS)
        };
        // SAFETY: arguments in the order of gemm.cu; the maps clip loads and stores to the matrices,
        // whose sizes the caller checked, and the guards above order the stream after their writers.
        unsafe { self.launch("launch of gemm", &function, grid, &args) }?;
        drop((out_guard, a_guard, b_guard));
        let partial = |part, cols| Partial {
            part,
            splits: segments,
            ranks: rank as usize,
            cols,
        };
        let a = (a_cols > 0).then(|| partial(a_part, a_cols));
        let b = (b_cols > 0).then(|| partial(b_part, b_cols));
        Ok(Parts { a, b })
    }
}

/// Microseconds to read a matrix of halves once, at 4 TB/s.
fn micros(rows: usize, cols: usize) -> f64 {
    2.0 * rows as f64 * cols as f64 / 4e6
}

/// Columns of a matrix that `spare` blocks read while the others make the product.
fn beside(spare: usize, w_rows: usize, w_cols: usize) -> usize {
    spare * w_rows * w_cols / FLOPS_PER_SIDE_BYTE
}

/// Rows of a unit of side work, for about `units` of them in `chunks` of columns: more rows make fewer
/// partial sums to add, fewer spread better.
fn segment_rows(rows: usize, rank: usize, units: usize, chunks: usize) -> usize {
    let most = (SHARED_BYTES - SIDE_RING_BYTES) / (2 * rank) / 128 * 128;
    (rows * chunks)
        .div_ceil(units.max(1))
        .next_multiple_of(128)
        .max(if rank > 32 { 512 } else { 256 })
        .min(most)
}

/// Clusters with tiles: as many as finish as soon as all would, so that the others have time.
fn busy(tiles: usize, clusters: usize) -> usize {
    tiles.div_ceil(tiles.div_ceil(clusters))
}

/// How the first tiles share the depth of the rank-sized product, as in down.cuh.
#[derive(Debug, PartialEq, Eq)]
struct Shares {
    count: usize,
    window: usize,
    delay: usize,
}

/// As many shares as the clusters make in their first tiles; each begins `delay` steps before its own.
fn shares(
    clusters: usize,
    (rows, cols): (usize, usize),
    depth_blocks: usize,
    input_bytes: usize,
    delay: usize,
) -> Shares {
    let count = (clusters / rows)
        .min(cols)
        .min(depth_blocks)
        .clamp(1, MOST_SHARES);
    // A tile ends with windows that are not its own, which give the exchange time. Few windows interrupt
    // it least, but then tiles of a row read the input at different times, which has to stay in the cache.
    let most = if input_bytes <= CACHED {
        1
    } else {
        depth_blocks / count
    };
    for rounds in (1..=most).rev() {
        let window = depth_blocks.div_ceil(count * rounds);
        let before_last = (count * rounds - 1) * window;
        let idle =
            (count.saturating_sub(2) * window + depth_blocks).saturating_sub(before_last + delay);
        if count > 1 && before_last < depth_blocks && (idle >= EXCHANGE_STEPS || rounds == 1) {
            let delay = delay.min((count - 1) * window / 2);
            return Shares {
                count,
                window,
                delay,
            };
        }
    }
    Shares {
        count: 1,
        window: depth_blocks,
        delay: 0,
    }
}

/// What makes `q`, laid out as in down.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct DownArg {
    q: u64,
    partial: u64,
    shares: i32,
    window: i32,
    delay: i32,
    scale: f32,
}

// SAFETY: plain words in the layout of the kernel's struct `Down`.
unsafe impl DeviceRepr for DownArg {}

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

/// Work beside the tiles, laid out as in side.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct Side {
    q: [u64; 2],
    part: [u64; 2],
    strides: [i32; 2],
    cols: [i32; 2],
    segment_rows: i32,
    all: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for Side {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_side_work_fit() {
        for rank in [16, 32, 64] {
            for rows in [1, 128, 2048, 8192, 100_000] {
                for (units, chunks) in [(0, 0), (4, 1), (528, 36), (528, 2)] {
                    let found = segment_rows(rows, rank, units, chunks);
                    assert!(
                        found >= 256 && found.is_multiple_of(128),
                        "{found} of {rows}"
                    );
                    assert!(SIDE_RING_BYTES + 2 * rank * found <= SHARED_BYTES);
                }
            }
        }
    }

    #[test]
    fn shares_cover_the_depth_and_end_early() {
        for clusters in [57, 64, 66] {
            for rows in [1, 8, 31, 32, 33, 200] {
                for cols in [1, 2, 16] {
                    for depth_blocks in [1, 2, 9, 64, 224] {
                        for bytes in [1, 1 << 30] {
                            let found = shares(clusters, (rows, cols), depth_blocks, bytes, 4);
                            let Shares {
                                count,
                                window,
                                delay,
                            } = found;
                            assert!((1..=cols).contains(&count), "{found:?}");
                            assert!(count == 1 || count * rows <= clusters, "{found:?}");
                            // Every share has a window, and begins outside of its own.
                            assert!((count - 1) * window < depth_blocks, "{found:?}");
                            assert!(delay <= (count - 1) * window, "{found:?}");
                        }
                    }
                }
            }
        }
        let (count, window, delay) = (2, 16, 4);
        assert_eq!(
            shares(64, (32, 16), 64, 64 << 20, 4),
            Shares {
                count,
                window,
                delay
            }
        );
    }
}
