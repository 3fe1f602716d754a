//! The best thin product for a whole matrix.

use candle_core::{Device, Result, Tensor};

use super::{
    matrix::Matrix,
    product::{Product, Truncated},
};
use crate::philox::philox;

/// The product of at most `rank` that is nearest to `delta`, `[out, in]` in f64.
///
/// Randomised (Halko, Martinsson and Tropp 2011): a few more directions than asked for, sharpened
/// by power iterations. Exact where those directions are all there are.
pub(super) fn truncated(delta: &Tensor, rank: usize) -> Result<Truncated> {
    const MORE: usize = 16;
    const ITERATIONS: usize = 6;
    let (outputs, inputs) = delta.dims2()?;
    let directions = rank.saturating_add(MORE).min(outputs).min(inputs);
    let transposed = delta.t()?.contiguous()?;
    let basis = |columns: &Tensor| Matrix::of(columns)?.qr().0.tensor();
    let mut left = basis(&delta.matmul(&signs(inputs, directions)?)?)?;
    for _ in 0..ITERATIONS {
        let right = basis(&transposed.matmul(&left)?)?;
        left = basis(&delta.matmul(&right)?)?;
    }
    let within = Product {
        a: left.t()?.matmul(delta)?,
        b: left,
    };
    let total = delta.sqr()?.sum_all()?.to_scalar::<f64>()?;
    let Truncated { product, .. } = within.truncated(rank)?;
    let kept = product.norm()?.powi(2);
    let energy = if total > 0.0 {
        (kept / total).min(1.0)
    } else {
        1.0
    };
    Ok(Truncated { product, energy })
}

/// A matrix of random signs, the same at every call.
fn signs(rows: usize, columns: usize) -> Result<Tensor> {
    let count = rows * columns;
    let mut signs = Vec::with_capacity(count.next_multiple_of(128));
    for block in 0..count.div_ceil(128) as u64 {
        for word in philox::<7>([block as u32, (block >> 32) as u32, 0, 0], [0x51_6e, 0]) {
            signs.extend((0..32).map(|bit| if word >> bit & 1 == 1 { 1.0 } else { -1.0 }));
        }
    }
    signs.truncate(count);
    Tensor::from_vec(signs, (rows, columns), &Device::Cpu)
}
