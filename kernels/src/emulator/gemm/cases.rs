//! What the emulated kernel computes, against f64.

use half::bf16;

use super::super::{SCALE, dropout, is_close};
use super::{Case, Emulator, Found, Inputs, Options};
use crate::gemm::Product;
use crate::hopper::DEPTH;

impl Emulator {
    /// Compares with f64.
    pub(super) fn check(&self, case: Case) {
        let Case {
            rows, depth, cols, ..
        } = case;
        let Options {
            product,
            ranks,
            masked,
            given,
            ..
        } = self.options;
        let forward = product == Product::Forward;
        let (dropout, mask) = dropout(masked);
        let factor = |row: usize, col, width| f64::from(dropout.factor(row as u64, col, width));
        let inputs = Inputs::new(case, self.options);
        let found = self.run(case, mask, &inputs);
        self.check_gradients(case, &inputs, &found);
        let Found { s, out, .. } = found;
        let close = |what: &str, row: usize, col: usize, found: bf16, expected: f64| {
            assert!(
                is_close(found, expected),
                "{:?} {case:?}: {what} [{row}, {col}] is {found} instead of {expected}",
                self.options
            );
        };
        for row in 0..rows {
            let x = &inputs.x[row * depth..][..depth];
            let kept: Vec<f64> = (0..depth)
                .map(|k| x[k].to_f64() * if forward { factor(row, k, depth) } else { 1.0 })
                .collect();
            let s = &s[row * ranks..][..ranks];
            for (rank, &found) in s.iter().enumerate().filter(|_| !given) {
                let a = &inputs.a[rank * inputs.a_cols..][..depth];
                let sum: f64 = kept.iter().zip(a).map(|(x, a)| x * a.to_f64()).sum();
                close("q", row, rank, found, SCALE * sum);
            }
            // A part of the columns, another for every row; S as it was rounded.
            for col in (row % 7..cols).step_by(7) {
                let w = |k: usize| {
                    inputs.w[if forward {
                        col * depth + k
                    } else {
                        k * cols + col
                    }]
                };
                let p = |j: usize| {
                    inputs.p[if forward {
                        col * ranks + j
                    } else {
                        j * inputs.p_cols + col
                    }]
                };
                let base: f64 = (0..depth).map(|k| x[k].to_f64() * w(k).to_f64()).sum();
                let mut low: f64 = (0..ranks).map(|j| s[j].to_f64() * p(j).to_f64()).sum();
                if !forward && factor(row, col, cols) == 0.0 {
                    low = 0.0;
                }
                let expected = base + low + inputs.bias[col].to_f64();
                close("the output", row, col, out[row * cols + col], expected);
            }
        }
    }
}

/// Runs all `cases` with `options`.
fn check(options: Options, cases: &[(usize, usize, usize, usize)]) {
    let Some(emulator) = Emulator::compile(options) else {
        return;
    };
    for &(rows, depth, cols, clusters) in cases {
        emulator.check(Case {
            rows,
            depth,
            cols,
            clusters,
            beside: 0,
        });
    }
}

/// One step of the depth and several, of an odd number too; one tile; rows and columns that end within a tile; as many
/// clusters as tiles, and fewer; and the last two with shares in several rounds, in one of which shares of a row wait for a
/// cluster's next tile.
const CASES: [(usize, usize, usize, usize); 8] = [
    (1, 8, 8, 1),
    (130, 72, 264, 2),
    (300, 264, 520, 6),
    (257, 576, 1100, 10),
    (520, 136, 1300, 4),
    (600, 10 * DEPTH, 520, 3),
    (4200, 136, 700, 17),
    (4200, 136, 500, 17),
];

const FORWARD: Options = Options {
    product: Product::Forward,
    ranks: 16,
    masked: false,
    tail: false,
    given: false,
    side: false,
};
pub(super) const BACKWARD: Options = Options {
    product: Product::Backward,
    ..FORWARD
};

#[test]
fn tiles_make_s_and_use_it() {
    check(FORWARD, &CASES);
}

#[test]
fn tiles_make_a_masked_s() {
    let masked = true;
    check(Options { masked, ..FORWARD }, &CASES);
}

#[test]
fn tiles_make_s_of_many_ranks() {
    for (ranks, masked) in [(64, false), (32, true)] {
        let options = Options {
            ranks,
            masked,
            ..FORWARD
        };
        check(options, &CASES[2..5]);
    }
}

#[test]
fn several_clusters_make_the_last_tiles() {
    let cases = [(520, 264, 1100, 7), (600, 10 * DEPTH, 1700, 5)];
    for masked in [false, true] {
        let options = Options {
            masked,
            tail: true,
            ..FORWARD
        };
        check(options, &cases);
    }
}

#[test]
fn tiles_make_the_gradient_of_s() {
    for masked in [false, true] {
        check(Options { masked, ..BACKWARD }, &CASES[..6]);
    }
}
