//! A small matrix product for blocks that fit the cache.

use super::Real;

/// The side of the blocks of `b`: one block stays in the first cache while all rows of `a` pass.
pub(crate) const BLOCK: usize = 64;

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
    let a = |i: usize, p: usize| a.data[i * a.row_stride + p * a.col_stride];
    for p_block in (0..k).step_by(BLOCK) {
        let p_end = k.min(p_block + BLOCK);
        for j in (0..n).step_by(BLOCK) {
            let width = BLOCK.min(n - j);
            let b_row = |p: usize| &b[p * b_stride + j..][..width];
            for i in 0..m {
                let c_row = &mut c[i * c_stride + j..][..width];
                // Four rows of b at a time, so that c is read and written a quarter as often.
                let mut p = p_block;
                while p + 4 <= p_end {
                    let (a0, a1, a2, a3) = (a(i, p), a(i, p + 1), a(i, p + 2), a(i, p + 3));
                    let (b0, b1) = (b_row(p), b_row(p + 1));
                    let (b2, b3) = (b_row(p + 2), b_row(p + 3));
                    for j in 0..width {
                        c_row[j] += (a0 * b0[j] + a1 * b1[j]) + (a2 * b2[j] + a3 * b3[j]);
                    }
                    p += 4;
                }
                for p in p..p_end {
                    let a = a(i, p);
                    for (c, &b) in c_row.iter_mut().zip(b_row(p)) {
                        *c += a * b;
                    }
                }
            }
        }
    }
}
