//! Decoding: y and S of a few tokens, in one launch.

use half::bf16;

use super::{Program, SCALE, SEED, bytes, is_close, random};
use crate::decode::{SHARED_BYTES, ring, token_tiles};
use crate::rows::padded_rank;

/// `(tokens, in, out, rank)` of layers, by a kernel whose rings have `stages` stages, or as many as there is room for.
fn check(f32_adapter: bool, stages: Option<usize>, layers: &[(usize, usize, usize, usize)]) {
    for &layer in layers {
        let (tokens, cols, rows, rank) = layer;
        let (tiles, ranks) = (token_tiles(tokens), padded_rank(rank));
        let defines = [
            ("NT", tiles),
            ("RT", ranks),
            ("ADAPTER_F32", usize::from(f32_adapter)),
        ];
        let Some(program) = Program::compile("decode.cpp", &defines) else {
            return;
        };
        let most = if f32_adapter {
            ring::<f32>(tiles, ranks, SHARED_BYTES).0
        } else {
            ring::<bf16>(tiles, ranks, SHARED_BYTES).0
        };
        let mut state = SEED;
        let mut random = |len| random(&mut state, len);
        let (x, w, bias) = (random(tokens * cols), random(rows * cols), random(rows));
        let (a, b) = (random(rank * cols), random(rows * rank));
        let mut input = bytes(x.iter().chain(&w).chain(&bias));
        if f32_adapter {
            input.extend(a.iter().chain(&b).flat_map(|v| v.to_f32().to_le_bytes()));
        } else {
            input.extend(bytes(a.iter().chain(&b)));
        }
        let numbers = [tokens, cols, rows, rank].map(|n| n as f64);
        let arguments = [&numbers[..], &[SCALE, stages.unwrap_or(most) as f64]].concat();
        let mut output = program.run(&arguments, input);
        let (s, y) = (output.halves(tokens * ranks), output.halves(tokens * rows));
        output.end();
        let product = |a: &[bf16], b: &[bf16]| -> f64 {
            a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
        };
        for token in 0..tokens {
            let x = &x[token * cols..][..cols];
            let low: Vec<f64> = (0..ranks)
                .map(|j| match a.get(j * cols..(j + 1) * cols) {
                    Some(a) => SCALE * product(x, a),
                    None => 0.0,
                })
                .collect();
            for (j, &expected) in low.iter().enumerate() {
                let found = s[token * ranks + j];
                assert!(
                    is_close(found, expected),
                    "{layer:?}: S [{token}, {j}] is {found} instead of {expected}"
                );
            }
            for row in 0..rows {
                let up: f64 = (0..rank).map(|j| low[j] * b[row * rank + j].to_f64()).sum();
                let expected = product(x, &w[row * cols..][..cols]) + bias[row].to_f64() + up;
                let found = y[token * rows + row];
                // S is rounded before it is multiplied.
                let rounded: f64 = (0..rank)
                    .map(|j| (low[j] * b[row * rank + j].to_f64()).abs())
                    .sum();
                let error = (found.to_f64() - expected).abs();
                assert!(
                    error <= 0.006 * (1.0 + expected.abs() + rounded),
                    "{layer:?}: y [{token}, {row}] is {found} instead of {expected}"
                );
            }
        }
    }
}

#[test]
fn few_tokens_have_the_right_output_and_s() {
    let layers = [
        (1, 8, 8, 1),
        (5, 520, 100, 3),
        (9, 136, 129, 16),
        (33, 1032, 72, 24),
        (64, 264, 65, 64),
        (100, 264, 70, 32),
    ];
    check(true, None, &layers);
    check(false, None, &layers[1..5]);
}

#[test]
fn rings_run_round() {
    check(true, Some(2), &[(17, 1096, 130, 16), (5, 712, 40, 40)]);
}
