//! The gradients that are made beside the tiles, against f64.

use super::super::{across, dropout, is_close_sum};
use super::cases::BACKWARD;
use super::{Case, Emulator, Found, Inputs, Options, SPLITS, SUM_COLS, UNUSED_RANKS};

impl Emulator {
    /// Compares those of `found`, if any are made, with f64.
    pub(super) fn check_gradients(&self, case: Case, inputs: &Inputs, found: &Found) {
        let Some([b, a, sums]) = &found.gradients else {
            return;
        };
        let Options {
            ranks,
            masked,
            given,
            ..
        } = self.options;
        let Case { depth, cols, .. } = case;
        let (dropout, _) = dropout(masked);
        let close = |what: &str, at: [usize; 2], found: f32, expected: f64| {
            assert!(
                is_close_sum(found.into(), expected),
                "{:?} {case:?}: {what} {at:?} is {found} instead of {expected}",
                self.options
            );
        };
        let rank = ranks - UNUSED_RANKS;
        let x: Vec<f64> = inputs.x.iter().map(|x| x.to_f64()).collect();
        // The scale is in dS.
        let kept = |at: usize| dropout.factor((at / cols) as u64, at % cols, cols) != 0.0;
        let xs = inputs.xs.iter().enumerate();
        let xs: Vec<f64> = xs
            .map(|(at, x)| if kept(at) { x.to_f64() } else { 0.0 })
            .collect();
        let db = across(&inputs.s, ranks, &x, depth);
        let da = across(&found.s, ranks, &xs, cols);
        for j in 0..rank {
            for col in 0..depth {
                close("dB", [col, j], b[col * rank + j], db[j * depth + col]);
            }
            for col in 0..cols {
                let before = 1.0;
                close(
                    "dA",
                    [j, col],
                    a[j * cols + col],
                    before + da[j * cols + col],
                );
            }
            for col in (0..SUM_COLS).filter(|_| given) {
                let part =
                    |split: usize| inputs.parts[(split * ranks + j) * SUM_COLS + col].to_f64();
                let sum: f64 = (0..SPLITS).map(part).sum();
                close("a sum", [j, col], sums[j * SUM_COLS + col], 1.0 + sum);
            }
        }
    }
}

fn check(options: Options, cases: &[(usize, usize, usize, usize, usize)]) {
    let side = true;
    let Some(emulator) = Emulator::compile(Options { side, ..options }) else {
        return;
    };
    for &(rows, depth, cols, clusters, beside) in cases {
        emulator.check(Case {
            rows,
            depth,
            cols,
            clusters,
            beside,
        });
    }
}

/// Clusters without tiles make whole columns, a block several of them; and segments of what is left; halves alone; segments
/// alone. All blocks make segments, where no cluster is without tiles; and some make whole columns before.
const CASES: [(usize, usize, usize, usize, usize); 6] = [
    (380, 576, 520, 7, 1 << 20),
    (300, 1096, 520, 8, 1 << 20),
    (300, 576, 520, 10, 1 << 20),
    (300, 576, 520, 9, 1 << 20),
    (600, 264, 520, 9, 0),
    (300, 2000, 520, 8, 2300),
];

#[test]
fn they_are_made_beside_tiles_that_make_the_gradient_of_s() {
    for masked in [false, true] {
        check(Options { masked, ..BACKWARD }, &CASES);
    }
}

#[test]
fn they_are_made_of_a_given_gradient_of_s() {
    for masked in [false, true] {
        let given = Options {
            masked,
            given: true,
            ..BACKWARD
        };
        check(given, &CASES);
    }
}

#[test]
fn those_of_many_ranks_take_their_factor_in_turns() {
    let options = Options {
        ranks: 64,
        masked: true,
        ..BACKWARD
    };
    check(options, &[(1100, 136, 264, 11, 1 << 20)]);
}
