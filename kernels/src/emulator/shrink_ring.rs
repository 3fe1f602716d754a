//! S in a pass of its own.

use super::{Program, SCALE, SEED, bytes, dropout, is_close, numbers, random};
use crate::rows::padded_width;
use crate::shrink_ring::Teams;

/// `(rows, columns)` of inputs, for `blocks` of ranks, by each way in which blocks take their work.
fn check(ranks: usize, blocks: usize, masked: bool, inputs: &[(usize, usize)]) {
    let (dropout, mask) = dropout(masked);
    for teams in Teams::all(ranks) {
        let mut defines = vec![("DROPOUT", usize::from(masked))];
        defines.extend(
            teams
                .defines(ranks)
                .map(|(name, value)| (name, value as usize)),
        );
        let Some(program) = Program::compile("shrink_ring.cpp", &defines) else {
            return;
        };
        for (early, &(rows, cols)) in inputs.iter().enumerate() {
            let (all, wide) = (ranks * blocks, padded_width(cols));
            let mut state = SEED;
            let (x, a) = (
                random(&mut state, rows * cols),
                random(&mut state, all * wide),
            );
            let sizes = [rows, cols, all, early % 2].map(|n| n as f64);
            let arguments = [&sizes[..], &[SCALE], &numbers(mask)].concat();
            let mut output = program.run(&arguments, bytes(x.iter().chain(&a)));
            let s = output.halves(rows * all);
            output.end();
            for row in 0..rows {
                let x: Vec<f64> = (0..cols)
                    .map(|k| {
                        x[row * cols + k].to_f64() * f64::from(dropout.factor(row as u64, k, cols))
                    })
                    .collect();
                for j in 0..all {
                    let sum: f64 = x
                        .iter()
                        .zip(&a[j * wide..])
                        .map(|(x, a)| x * a.to_f64())
                        .sum();
                    let found = s[row * all + j];
                    assert!(
                        is_close(found, SCALE * sum),
                        "{} {rows} x {cols}: S [{row}, {j}] is {found} instead of {}",
                        program.name,
                        SCALE * sum
                    );
                }
            }
        }
    }
}

/// Fewer boxes than teams, as many as rings hold, and more; rows that end within a block.
const INPUTS: [(usize, usize); 4] = [(3, 8), (70, 264), (16, 1096), (97, 5000)];

#[test]
fn a_pass_makes_s() {
    check(16, 1, false, &INPUTS);
    check(64, 2, false, &INPUTS);
}

#[test]
fn a_pass_makes_a_masked_s() {
    check(16, 1, true, &INPUTS);
    check(32, 1, true, &INPUTS[1..]);
    check(64, 1, true, &INPUTS[1..3]);
}
