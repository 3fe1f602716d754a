//! A small matrix product for blocks that fit the cache.

use super::Real;

/// The columns of one register tile.
pub(crate) const TILE: usize = 16;

/// The rows of one register tile.
const TILE_ROWS: usize = 4;

/// A matrix in a slice: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

/// `c += a b` for `a` [m, k], `b` [k, n] and `c` [m, n].
///
/// The columns of `b` and `c` are adjacent; `b_stride` and `c_stride` are the distances of their rows.
#[inline(always)]
pub(crate) fn matmul_add<T: Real>(
    [m, n, k]: [usize; 3],
    a: Matrix<'_, T>,
    (b, b_stride): (&[T], usize),
    (c, c_stride): (&mut [T], usize),
) {
    if k == 0 {
        return;
    }
    for j in (0..n).step_by(TILE) {
        let width = TILE.min(n - j);
        let b = (&b[j..], b_stride);
        for i in (0..m).step_by(TILE_ROWS) {
            let a = Matrix {
                data: &a.data[i * a.row_stride..],
                ..a
            };
            let c = (&mut c[i * c_stride + j..], c_stride);
            match m - i {
                1 => tile::<T, 1>(width, k, a, b, c),
                2 => tile::<T, 2>(width, k, a, b, c),
                3 => tile::<T, 3>(width, k, a, b, c),
                _ => tile::<T, TILE_ROWS>(width, k, a, b, c),
            }
        }
    }
}

/// [`matmul_add`] for `ROWS` rows and at most [`TILE`] columns, summed in registers.
#[inline(always)]
fn tile<T: Real, const ROWS: usize>(
    width: usize,
    k: usize,
    a: Matrix<'_, T>,
    (b, b_stride): (&[T], usize),
    (c, c_stride): (&mut [T], usize),
) {
    let mut sums = [[T::ZERO; TILE]; ROWS];
    if width == TILE {
        for p in 0..k {
            let b_row = &b[p * b_stride..][..TILE];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = a.data[i * a.row_stride + p * a.col_stride];
                for (sum, &b) in sums.iter_mut().zip(b_row) {
                    *sum += a * b;
                }
            }
        }
    } else {
        for p in 0..k {
            let b_row = &b[p * b_stride..][..width];
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = a.data[i * a.row_stride + p * a.col_stride];
                for (sum, &b) in sums.iter_mut().zip(b_row) {
                    *sum += a * b;
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (c, &sum) in c[i * c_stride..][..width].iter_mut().zip(sums) {
            *c += sum;
        }
    }
}
