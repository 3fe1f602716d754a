//! Work beside the tiles of the Hopper kernel: gradients of the adapter.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr, SyncOnDrop};

use crate::element::Element;
use crate::error::Result;
use crate::hopper::{CLUSTER, SHARED_BYTES};
use crate::launch::Launcher;
use crate::reduce::{Gradient, Sum, SumArg};
use crate::rows::Rows;
use crate::skinny::Partial;
use crate::tensor_map::TensorMap;

// As in side.cuh.
pub(crate) const BOX_ROWS: usize = 32;
pub(crate) const CHUNK: usize = 512;
/// Rings of boxes and the bits of their masks, rows of q, and pieces of sums.
const BYTES: usize = 8 * 4 * (BOX_ROWS * 64 * 2 + 512) + 2048 * 16 * 2 + 8 * 8 * 64 * 4;
const _: () = assert!(BYTES <= SHARED_BYTES);

/// Multiplications of the tensor cores of the whole card while one block of side work reads a byte:
/// about 770 TFLOP/s against 48 GB/s, measured beside full tiles on an H200.
const FLOPS_PER_SIDE_BYTE: usize = 16_000;

/// Gradients of the adapter, of at most [`MOST_MADE`](crate::making::MOST_MADE) ranks.
pub(crate) struct SideWork<'a, T> {
    /// Of B, from `S` of the forward `[rows, padded_rank]` and the input of the product.
    pub b: Option<(&'a Rows<'a, T>, &'a Gradient<'a>)>,
    /// Of A, from the input of the layer, masked like the output, and `q`: its first columns, all or a multiple of
    /// [`CHUNK`].
    pub a: Option<(&'a Rows<'a, T>, &'a Gradient<'a>, usize)>,
    /// From the partial sums of the kernel before this one, where `q` is given; two at most.
    pub before: Vec<Sum<'a>>,
}

/// What [`SideWork`] leaves: partial sums of the columns that no block made all rows of.
#[derive(Default)]
pub(crate) struct Parts {
    pub a: Option<Partial>,
    pub b: Option<Partial>,
}

/// Ranks of side work, and whether it is masked: by that a block is slower than the memory lets it be.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    pub ranks: usize,
    pub masked: bool,
}

/// Columns of a matrix that `spare` blocks read while the others make the product.
pub(crate) fn beside(spare: usize, (w_rows, w_cols): (usize, usize), pace: Pace) -> usize {
    // More ranks are bound by their arithmetic: of 64, a block makes a chunk of 8192 rows in 200 µs, masked in 255, measured
    // on an H100 beside tiles that take 350. So it is to make one and a half meanwhile, or one, not two.
    let (slower, than) = match pace {
        Pace { ranks: ..=32, .. } => (1, 1),
        Pace { masked: false, .. } => (4, 3),
        Pace { masked: true, .. } => (2, 1),
    };
    spare * w_rows * w_cols * than / (slower * FLOPS_PER_SIDE_BYTE)
}

/// How side work is cut.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Units {
    /// Chunks of columns of which the two blocks of a cluster make half of the rows each, before the others.
    pub halved: usize,
    /// Chunks of columns that one block makes all rows of: no sums are left to add up.
    pub whole: usize,
    /// Rows of a unit of the other chunks.
    pub segment_rows: usize,
    /// Whether blocks help that are done with their tiles.
    pub all: bool,
}

impl Units {
    /// For `blocks`, of which `spare` have no tiles and read `beside` columns while the others make the product.
    pub fn new(
        (rows, cols, rank): (usize, [usize; 2], usize),
        (blocks, spare): (usize, usize),
        beside: usize,
    ) -> Self {
        let chunks: usize = cols.map(|cols| cols.div_ceil(CHUNK)).iter().sum();
        let all = cols[0] + cols[1] > beside;
        let idle = spare / CLUSTER;
        // Where others help in the end, a tenth of the time is left for chance.
        let (halved, whole) = match spare {
            0 => (0, 0),
            _ if all => (0, chunks.min(spare * (9 * beside / (10 * CHUNK * spare)))),
            _ if chunks.is_multiple_of(idle) => {
                let halved = idle * (chunks / idle % 2);
                (halved, chunks - halved)
            }
            _ => (0, spare * (chunks / spare)),
        };
        let rest = chunks - halved - whole;
        let segment_rows = match (rest, all) {
            (0, _) => rows,
            (_, false) => rows.div_ceil(spare.max(1)),
            // Few, so that all are done at once, but not so few that their sums cost more.
            (_, true) => (rows * rest)
                .div_ceil(4 * blocks)
                .max(if rank > 32 { 512 } else { 256 }),
        };
        Self {
            halved,
            whole,
            segment_rows: segment_rows.next_multiple_of(128),
            all,
        }
    }

    /// Columns of a product whose first chunk is number `first`, that whole units make.
    pub fn whole_cols(&self, first: usize, cols: usize) -> usize {
        ((self.halved + self.whole).saturating_sub(first) * CHUNK).min(cols)
    }
}

/// Clusters with tiles: as many as finish as soon as all would, so that the others have time.
pub(crate) fn busy(tiles: usize, clusters: usize) -> usize {
    tiles.div_ceil(tiles.div_ceil(clusters))
}

/// The launch that side work is beside, of `blocks` blocks, of which `spare` have no tiles.
pub(crate) struct Around<'a, T> {
    pub input: &'a Rows<'a, T>,
    /// Rows and columns of the weight.
    pub weight: (usize, usize),
    /// Address and row stride of the rank-sized factor, which the gradient of A is made from.
    pub q: (u64, usize),
    pub pace: Pace,
    pub blocks: usize,
    pub spare: usize,
}

/// Side work of one launch.
pub(crate) struct SideLaunch<'a> {
    pub arg: SideArg,
    /// Of the matrices that the gradients of B and A are made from.
    pub maps: [TensorMap; 2],
    parts: Parts,
    _halves: CudaSlice<f32>,
    _guards: Vec<SyncOnDrop<'a>>,
}

impl SideLaunch<'_> {
    /// What it leaves, after the launch.
    pub fn into_parts(self) -> Parts {
        self.parts
    }
}

impl Launcher<'_> {
    /// Cuts `work` and makes room for what it gives.
    pub fn side_launch<'a, T: Element>(
        &'a self,
        work: &'a SideWork<'a, T>,
        around: Around<T>,
    ) -> Result<SideLaunch<'a>> {
        let Around {
            input,
            weight,
            q,
            pace,
            blocks,
            spare,
        } = around;
        let rows = input.rows;
        let b_cols = work.b.map_or(0, |_| input.cols);
        let (a_cols, a_stride) = work.a.map_or((0, 0), |(xs, _, cols)| (cols, xs.cols));
        let rank = pace.ranks;
        let beside = beside(spare, weight, pace);
        let units = Units::new((rows, [b_cols, a_cols], rank), (blocks, spare), beside);
        let segments = rows.div_ceil(units.segment_rows);
        let mut guards = Vec::new();
        let mut address = |view: &'a CudaView<'a, T>| {
            let (at, guard) = view.device_ptr(self.stream);
            guards.push(guard);
            at
        };
        let map = |at, rows: &Rows<T>| {
            TensorMap::new::<T>(at, (rows.rows, rows.cols, rows.stride), BOX_ROWS)
        };

        let left = |cols: usize, stride: usize, first_chunk: usize| {
            let made = units.whole_cols(first_chunk, cols)..cols;
            if made.is_empty() {
                return Ok(None);
            }
            let part = self.alloc::<f32>("partial gradients", segments * rank * stride)?;
            Ok(Some(Partial {
                part,
                splits: segments,
                ranks: rank,
                cols: stride,
                made,
            }))
        };
        let parts = Parts {
            b: left(b_cols, b_cols, 0)?,
            a: left(a_cols, a_stride, b_cols.div_ceil(CHUNK))?,
        };
        let sum = |gradient: &Gradient, part: &Option<Partial>, stride: usize, cols: usize| {
            let at = part
                .as_ref()
                .map_or(0, |part| part.part.device_ptr(self.stream).0);
            gradient.sum(at, segments, (rank, stride), 0..cols)
        };
        let mut arg = SideArg {
            halved: units.halved as i32,
            whole: units.whole as i32,
            segment_rows: units.segment_rows as i32,
            all: i32::from(units.all),
            ..SideArg::default()
        };
        let mut maps = [map(self.address(&input.data), input)?; 2];
        if let Some((s, gradient)) = work.b {
            arg.q[0] = address(&s.data);
            arg.strides[0] = s.stride as i32;
            arg.sums[0] = sum(gradient, &parts.b, b_cols, b_cols);
        }
        if let Some((xs, gradient, _)) = work.a {
            (arg.q[1], arg.strides[1]) = (q.0, q.1 as i32);
            arg.sums[1] = sum(gradient, &parts.a, a_stride, a_cols);
            maps[1] = map(address(&xs.data), xs)?;
        }
        for (arg, sum) in arg.before.iter_mut().zip(&work.before) {
            let (at, guard) = sum.partial.part.device_ptr(self.stream);
            guards.push(guard);
            *arg = sum.arg(at);
        }
        let halves = self.alloc::<f32>("halves of gradients", units.halved * rank * CHUNK)?;
        arg.halves = halves.device_ptr(self.stream).0;
        Ok(SideLaunch {
            arg,
            maps,
            parts,
            _halves: halves,
            _guards: guards,
        })
    }
}

/// Work beside the tiles, laid out as in side.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct SideArg {
    pub q: [u64; 2],
    pub sums: [SumArg; 2],
    pub before: [SumArg; 2],
    pub halves: u64,
    pub strides: [i32; 2],
    pub halved: i32,
    pub whole: i32,
    pub segment_rows: i32,
    pub all: i32,
}

// SAFETY: plain words in the layout of the kernel's struct `Side`.
unsafe impl DeviceRepr for SideArg {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_blocks_take_whole_columns_where_they_divide() {
        let units = |cols, spare| Units::new((8192, cols, 16), (132, spare), 1 << 20);
        let expected = |halved, whole, segment_rows| Units {
            halved,
            whole,
            segment_rows,
            all: false,
        };
        assert_eq!(units([0, 4096], 4), expected(0, 8, 8192));
        assert_eq!(units([14336, 4096], 4), expected(0, 36, 8192));
        assert_eq!(units([0, 5120], 4), expected(2, 8, 8192));
        assert_eq!(units([0, 1024], 4), expected(2, 0, 8192));
        assert_eq!(units([512, 8], 4), expected(2, 0, 8192));
        assert_eq!(units([0, 512], 4), expected(0, 0, 2048));
        assert_eq!(units([0, 0], 4), expected(0, 0, 8192));
    }

    #[test]
    fn all_blocks_take_what_is_left() {
        let units = |cols, rank, beside| Units::new((8192, cols, rank), (132, 4), beside);
        let expected = |whole, segment_rows| Units {
            halved: 0,
            whole,
            segment_rows,
            all: true,
        };
        assert_eq!(units([0, 2048], 16, 1048), expected(0, 256));
        assert_eq!(units([14336, 4096], 16, 14_680), expected(24, 256));
        assert_eq!(units([4096, 4096], 64, 3145), expected(4, 512));
        let cols = [14336, 4096];
        let found = units(cols, 16, 14_680);
        assert_eq!(
            [found.whole_cols(0, cols[0]), found.whole_cols(28, cols[1])],
            [24 * CHUNK, 0]
        );
    }
}
