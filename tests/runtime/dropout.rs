//! The masks of dropout, as numbers.

use lora_core::Mask;
use lora_kernels::{Dropout, Place};

const ROWS: usize = 4000;
const WIDTH: usize = 200; // more than stand in one unit of words

/// Probabilities of few bits and of many, and one that a byte cannot tell from zero.
const PROBABILITIES: [f64; 4] = [0.5, 0.3, 0.1, 0.001];

/// The factors of a matrix.
fn factors(p: f64) -> Vec<[f32; WIDTH]> {
    let mask = Mask::new(p, 8, 1, 2).unwrap();
    (0..ROWS as u64)
        .map(|row| std::array::from_fn(|column| mask.factor(row, column, WIDTH)))
        .collect()
}

#[test]
fn they_keep_the_expectation() {
    for p in PROBABILITIES {
        let n = (ROWS * WIDTH) as f64;
        let sum: f64 = factors(p).iter().flatten().map(|f| f64::from(*f)).sum();
        let mean = sum / n;
        // Four standard deviations of the mean of n draws.
        let bound = 4.0 * (p / (1.0 - p) / n).sqrt();
        assert!((mean - 1.0).abs() < bound, "p = {p}: {mean}");
    }
}

#[test]
fn elements_near_each_other_are_dropped_independently() {
    for p in PROBABILITIES {
        let factors = factors(p);
        // In one word or not.
        for (down, right) in [(0, 1), (0, 2), (0, 8), (0, 64), (0, 128), (1, 0), (1, 8)] {
            let both = factors
                .iter()
                .zip(&factors[down..])
                .flat_map(|(row, other)| row.iter().zip(&other[right..]))
                .filter(|&(f, other)| *f == 0.0 && *other == 0.0)
                .count() as f64;
            let pairs = ((ROWS - down) * (WIDTH - right)) as f64;
            let deviation = (pairs * p * p * (1.0 - p * p)).sqrt();
            assert!(
                (both - pairs * p * p).abs() < 4.0 * deviation + 1.0,
                "p = {p}, {down} rows and {right} columns apart: {both}"
            );
        }
    }
}

#[test]
fn the_kernels_have_the_same() {
    for p in PROBABILITIES {
        for (seed, site, step) in [(8, 1, 2), (u64::MAX / 3, u32::MAX, u64::MAX)] {
            let mask = Mask::new(p, seed, site, step).unwrap();
            let kernels = Dropout::new(Place::Pre, p, seed, site, step).unwrap();
            for width in [1, 7, 128, 300] {
                for row in [0, 1, 77, 1 << 33] {
                    for column in 0..width {
                        assert_eq!(
                            mask.factor(row, column, width),
                            kernels.factor(row, column, width),
                            "p = {p}, row {row}, column {column} of {width}"
                        );
                    }
                }
            }
        }
    }
}
