//! The product with S, or dS, which its tiles make or it is given, and the gradients beside.

use half::bf16;

use super::{Program, SCALE, SEED, bytes, numbers, random};
use crate::dropout::Mask;
use crate::gemm::Product;
use crate::hopper::{CLUSTER, TILE};
use crate::low::Tiling;
use crate::shares::Shares;
use crate::side::{self, CHUNK, Units};
use crate::tail::Tail;

mod cases;
mod gradients;

/// A product of `[rows, depth]` with `cols` columns on a card that holds `clusters`.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    depth: usize,
    cols: usize,
    clusters: usize,
    /// Columns that the clusters without tiles are thought to read meanwhile.
    beside: usize,
}

/// The kernel's options.
#[derive(Clone, Copy, Debug)]
struct Options {
    product: Product,
    ranks: usize,
    /// Of the input forward, of the adapter's part of the output backward.
    masked: bool,
    tail: bool,
    /// Whether S is given.
    given: bool,
    /// Whether gradients are made beside.
    side: bool,
}

/// What a launch gives.
struct Found {
    s: Vec<bf16>,
    out: Vec<bf16>,
    /// Of B, A, and the sums of the kernel before, if any are made.
    gradients: Option<[Vec<f32>; 3]>,
}

struct Emulator {
    program: Program,
    options: Options,
}

impl Emulator {
    /// None where there is no compiler.
    fn compile(options: Options) -> Option<Self> {
        let Options {
            product,
            ranks,
            masked,
            tail,
            given,
            side,
        } = options;
        let backward = product == Product::Backward;
        let program = Program::compile(
            "gemm.cpp",
            &[
                ("BACKWARD", usize::from(backward)),
                ("DROPOUT", if masked && backward { 2 } else { 0 }),
                ("RANK_STEPS", ranks / 16),
                (
                    "DOWN",
                    match (given, masked && !backward) {
                        (true, _) => 0,
                        (_, false) => 1,
                        (_, true) => 2,
                    },
                ),
                ("SIDE", usize::from(side)),
                ("TAIL", usize::from(tail)),
            ],
        )?;
        Some(Self { program, options })
    }

    /// One launch, with numbers as the launcher gives them.
    fn run(&self, case: Case, mask: Mask, inputs: &Inputs) -> Found {
        let Case {
            rows,
            depth,
            cols,
            clusters,
            beside,
        } = case;
        let Options {
            ranks, given, side, ..
        } = self.options;
        let (tile_rows, tile_cols) = (rows.div_ceil(TILE), cols.div_ceil(TILE));
        let tiles = tile_rows * tile_cols;
        let tiling = |busy| Tiling {
            product: self.options.product,
            rows: tile_rows,
            cols: tile_cols,
            busy,
            spare: 0,
        };
        let (tail, busy) = if self.options.tail {
            let tail = Tail::new(tiles, clusters, depth).expect("a tail");
            ((tail.first, tail.split), clusters)
        } else {
            ((tiles, 1), side::busy(tiles, clusters))
        };
        let shares = Shares::new(tiling(busy), depth);
        let end = if given { 0 } else { shares.end };
        assert!(end <= tail.0, "{case:?}: tiles of the tail make S");
        let sizes = [
            rows,
            depth,
            cols,
            busy,
            if side { clusters } else { busy },
            shares.count,
            shares.window,
            shares.early,
            shares.delay,
            shares.at_once,
            shares.stride,
        ]
        .map(|number| number as f64);
        let rest = [SCALE, tail.0 as f64, tail.1 as f64];
        let spare = CLUSTER * (clusters - busy);
        let units = Units::new(
            (rows, [depth, cols], ranks),
            (CLUSTER * clusters, spare),
            beside,
        );
        let beside = [
            units.halved,
            units.whole,
            units.segment_rows,
            usize::from(units.all),
            ranks - UNUSED_RANKS,
            units.whole_cols(0, depth),
            units.whole_cols(depth.div_ceil(CHUNK), cols),
        ]
        .map(|number| number as f64);
        let beside = if side { &beside[..] } else { &[] };
        let arguments = [&sizes[..], &rest, &numbers(mask), beside].concat();
        let mut output = self.program.run(&arguments, bytes(inputs.all()));
        let found = Found {
            s: output.halves(rows * ranks),
            out: output.halves(rows * cols),
            gradients: side.then(|| {
                [depth, cols, SUM_COLS].map(|cols| output.floats((ranks - UNUSED_RANKS) * cols))
            }),
        };
        output.end();
        found
    }
}

/// Random matrices, as the launcher has them: W and p are transposed backward, and p and `a`, which makes q, have padded
/// rows there. What an option does not ask for is empty.
struct Inputs {
    x: Vec<bf16>,
    w: Vec<bf16>,
    p: Vec<bf16>,
    p_cols: usize,
    a: Vec<bf16>,
    a_cols: usize,
    q: Vec<bf16>,
    bias: Vec<bf16>,
    /// Of the forward, `[rows, ranks]`, and the layer's input, `[rows, cols]`.
    s: Vec<bf16>,
    xs: Vec<bf16>,
    /// `[SPLITS, ranks, SUM_COLS]`
    parts: Vec<bf16>,
}

/// Ranks that an adapter has less than the kernel.
const UNUSED_RANKS: usize = 3;
// As in gemm.cpp.
const SPLITS: usize = 5;
const SUM_COLS: usize = 36;

impl Inputs {
    fn new(case: Case, options: Options) -> Self {
        let Case {
            rows, depth, cols, ..
        } = case;
        let Options {
            product,
            ranks,
            given,
            side,
            ..
        } = options;
        let mut state = SEED;
        let mut random = |len| random(&mut state, len);
        let a_cols = depth.next_multiple_of(8);
        let (p_rows, p_cols) = match product {
            Product::Forward => (cols, ranks),
            Product::Backward => (ranks, cols.next_multiple_of(8)),
        };
        Self {
            x: random(rows * depth),
            w: random(cols * depth),
            p: random(p_rows * p_cols),
            p_cols,
            a: random(if given { 0 } else { ranks * a_cols }),
            a_cols,
            q: random(if given { rows * ranks } else { 0 }),
            bias: random(cols),
            s: random(if side { rows * ranks } else { 0 }),
            xs: random(if side { rows * cols } else { 0 }),
            parts: random(if side && given {
                SPLITS * ranks * SUM_COLS
            } else {
                0
            }),
        }
    }

    fn all(&self) -> impl Iterator<Item = &bf16> {
        let Self {
            x,
            w,
            p,
            a,
            q,
            bias,
            s,
            xs,
            parts,
            ..
        } = self;
        [x, w, p, a, q, bias, s, xs, parts].into_iter().flatten()
    }
}
