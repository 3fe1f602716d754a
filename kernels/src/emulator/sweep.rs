//! The pass for both products of a matrix with rank-sized ones, and on through another matrix.

use half::bf16;

use super::{
    Program, SCALE, SEED, across, bytes, dropout, is_close, is_close_sum, numbers, random,
};

/// The kernel's options.
#[derive(Clone, Copy, Debug)]
struct Options {
    ranks: usize,
    pairs: usize,
    /// 1: z is masked by counter, 2: by bits.
    masked: usize,
    down: bool,
    /// Whether bits are drawn.
    bits: bool,
    /// Pairs of tiles of the other matrix.
    next: usize,
}

/// Of z and, from a column on, of the other matrix; blocks of a group, and rows of one.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    cols: usize,
    next: (usize, usize),
    group: usize,
    block_rows: usize,
}

fn check(options: Options, case: Case) {
    let Options {
        ranks,
        pairs,
        masked,
        down,
        bits,
        next: next_pairs,
    } = options;
    let Case {
        rows,
        cols,
        next: (next_cols, first_col),
        group,
        block_rows,
    } = case;
    let columns = |pairs| 128 * pairs * group;
    assert!(columns(pairs) >= cols, "{case:?}");
    assert!(next_pairs == 0 || columns(next_pairs) + first_col >= next_cols);
    let Some(program) = Program::compile(
        "sweep.cpp",
        &[
            ("RT", ranks),
            ("PAIRS", pairs),
            ("DROPOUT", masked),
            ("DOWN", usize::from(down)),
            ("BITS", usize::from(bits)),
            ("NEXT", next_pairs),
        ],
    ) else {
        return;
    };
    let (dropout, mask) = dropout(masked > 0 || bits);
    let given = |is_given: bool, len: usize| if is_given { len } else { 0 };
    let has_next = next_pairs > 0;
    let mut state = SEED;
    let mut random = |len| random(&mut state, len);
    let p_cols = cols.next_multiple_of(8);
    let [z, q, p, xs] = [
        rows * cols,
        rows * ranks,
        given(down, ranks * p_cols),
        given(has_next, rows * next_cols),
    ]
    .map(&mut random);
    let sizes = [rows, cols, block_rows, group, next_cols, first_col].map(|n| n as f64);
    let arguments = [&sizes[..], &[SCALE], &numbers(mask)].concat();
    let mut output = program.run(&arguments, bytes([&z, &q, &p, &xs].into_iter().flatten()));
    let blocks = rows.div_ceil(block_rows);
    let s = output.halves(given(down, rows * ranks));
    let part = output.floats(blocks * ranks * cols);
    let next_part = output.floats(given(has_next, blocks * ranks * next_cols));
    output.end();

    let factors = |is_masked: bool, cols: usize| {
        let factor = move |at: usize| match is_masked {
            true => f64::from(dropout.factor((at / cols) as u64, at % cols, cols)),
            false => 1.0,
        };
        (0..rows * cols).map(factor).collect::<Vec<f64>>()
    };
    let apply = |z: &[bf16], factors: Vec<f64>| -> Vec<f64> {
        z.iter().zip(factors).map(|(z, f)| z.to_f64() * f).collect()
    };
    let z = apply(&z, factors(masked > 0, cols));
    let check_sums =
        |what: &str, part: &[f32], q: &[bf16], z: &[f64], cols: usize, first: usize| {
            let sums = across(q, ranks, z, cols);
            for j in 0..ranks {
                for col in first..cols {
                    let expected = sums[j * cols + col];
                    let found: f64 = part
                        .iter()
                        .skip(j * cols + col)
                        .step_by(ranks * cols)
                        .map(|&part| f64::from(part))
                        .sum();
                    assert!(
                        is_close_sum(found, expected),
                        "{options:?} {case:?}: {what} [{j}, {col}] is {found} instead of {expected}"
                    );
                }
            }
        };
    check_sums("a sum", &part, &q, &z, cols, 0);
    for (at, &found) in s.iter().enumerate() {
        let (row, j) = (at / ranks, at % ranks);
        let sum: f64 = (0..cols)
            .map(|col| z[row * cols + col] * p[j * p_cols + col].to_f64())
            .sum();
        let expected = SCALE * (j / 16 + 1) as f64 * sum;
        assert!(
            is_close(found, expected),
            "{options:?} {case:?}: s [{row}, {j}] is {found} instead of {expected}"
        );
    }
    if has_next {
        let xs = apply(&xs, factors(bits, next_cols));
        check_sums("the next sum", &next_part, &s, &xs, next_cols, first_col);
    }
}

const OUTER: Options = Options {
    ranks: 16,
    pairs: 3,
    masked: 0,
    down: false,
    bits: false,
    next: 0,
};
/// A ring runs round, and the last block has fewer rows.
const CASE: Case = Case {
    rows: 580,
    cols: 700,
    next: (0, 0),
    group: 2,
    block_rows: 384,
};

#[test]
fn one_product_is_made_of_a_masked_matrix_too() {
    for masked in 0..3 {
        check(Options { masked, ..OUTER }, CASE);
    }
    let many = Options {
        ranks: 64,
        masked: 2,
        ..OUTER
    };
    check(many, CASE);
}

#[test]
fn both_products_are_made() {
    for (ranks, masked) in [(16, 0), (16, 1), (32, 0), (64, 1)] {
        let options = Options {
            ranks,
            masked,
            down: true,
            ..OUTER
        };
        check(options, CASE);
    }
    // Rows of a strip that no block count divides, and a block of one strip.
    let options = Options {
        pairs: 1,
        down: true,
        ..OUTER
    };
    let case = Case {
        rows: 400,
        group: 6,
        ..CASE
    };
    check(options, case);
}

#[test]
fn the_pass_goes_on_through_another_matrix() {
    for (ranks, bits) in [(16, false), (16, true), (32, true), (64, true)] {
        let options = Options {
            ranks,
            down: true,
            bits,
            next: 2,
            ..OUTER
        };
        let case = Case {
            next: (600, 192),
            ..CASE
        };
        check(options, case);
    }
    // Bits alone.
    let options = Options {
        down: true,
        bits: true,
        ..OUTER
    };
    let case = Case {
        next: (264, 0),
        ..CASE
    };
    check(options, case);
}
