//! The product that makes S, or dS, and uses it.

use half::bf16;

use super::{Program, SCALE, SEED, bytes, numbers, random};
use crate::dropout::Mask;
use crate::gemm::Product;
use crate::hopper::TILE;
use crate::low::Tiling;
use crate::shares::Shares;
use crate::side;
use crate::tail::Tail;

mod cases;

/// A product of `[rows, depth]` with `cols` columns on a card that holds `clusters`.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    depth: usize,
    cols: usize,
    clusters: usize,
}

/// The kernel's options.
#[derive(Clone, Copy, Debug)]
struct Options {
    product: Product,
    ranks: usize,
    /// Of the input forward, of the adapter's part of the output backward.
    masked: bool,
    tail: bool,
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
        } = options;
        let backward = product == Product::Backward;
        let program = Program::compile(
            "gemm.cpp",
            &[
                ("BACKWARD", usize::from(backward)),
                ("DROPOUT", if masked && backward { 2 } else { 0 }),
                ("RANK_STEPS", ranks / 16),
                ("DOWN", if masked && !backward { 2 } else { 1 }),
                ("SIDE", 0),
                ("TAIL", usize::from(tail)),
            ],
        )?;
        Some(Self { program, options })
    }

    /// S and the output.
    fn run(&self, case: Case, mask: Mask, inputs: &Inputs) -> (Vec<bf16>, Vec<bf16>) {
        let Case {
            rows,
            depth,
            cols,
            clusters,
        } = case;
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
        assert!(shares.end <= tail.0, "{case:?}: tiles of the tail make S");
        let sizes = [
            rows,
            depth,
            cols,
            busy,
            shares.count,
            shares.window,
            shares.early,
            shares.delay,
            shares.at_once,
            shares.stride,
        ]
        .map(|number| number as f64);
        let rest = [SCALE, tail.0 as f64, tail.1 as f64];
        let (s, out) = self.program.run(
            &[&sizes[..], &rest, &numbers(mask)].concat(),
            bytes(inputs.all()),
            rows * self.options.ranks,
        );
        assert_eq!(out.len(), rows * cols);
        (s, out)
    }
}

/// Random matrices, as the launcher has them: W and p are transposed backward, and p and `a`, which makes q, have padded
/// rows there.
struct Inputs {
    x: Vec<bf16>,
    w: Vec<bf16>,
    p: Vec<bf16>,
    p_cols: usize,
    a: Vec<bf16>,
    a_cols: usize,
    bias: Vec<bf16>,
}

impl Inputs {
    fn new(case: Case, product: Product, ranks: usize) -> Self {
        let Case {
            rows, depth, cols, ..
        } = case;
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
            a: random(ranks * a_cols),
            a_cols,
            bias: random(cols),
        }
    }

    fn all(&self) -> impl Iterator<Item = &bf16> {
        let Self {
            x, w, p, a, bias, ..
        } = self;
        x.iter().chain(w).chain(p).chain(a).chain(bias)
    }
}
