//! Products with one thin side, as an adapter's are: `X Aᵀ` and `Pᵀ X` for a rank of a few rows.
//!
//! candle's general product spends longer on getting started than on these. Sums are taken in an
//! order that depends on the shape alone.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::expand::Accumulator;
use crate::nn::cpu::{slice, vectorize};

/// `xs aᵀ`: `[tokens, rank]` of `xs [tokens, width]` and `a [rank, width]`. Not differentiable.
pub(crate) fn shrink(xs: &Tensor, a: &Tensor) -> Result<Tensor> {
    if !xs.device().is_cpu() {
        return xs.matmul(&a.t()?);
    }
    xs.contiguous()?.apply_op2_no_bwd(&a.contiguous()?, &Shrink)
}

/// `pᵀ xs`: `[rank, width]` of `p [tokens, rank]` and `xs [tokens, width]`. Not differentiable.
pub(crate) fn outer(p: &Tensor, xs: &Tensor) -> Result<Tensor> {
    if !xs.device().is_cpu() {
        return p.t()?.matmul(xs);
    }
    p.contiguous()?.apply_op2_no_bwd(&xs.contiguous()?, &Outer)
}

/// Runs an operation on two storages of one float type.
macro_rules! over_floats {
    ($op:ty, $a:expr, $a_layout:expr, $b:expr, $b_layout:expr, $dims:expr) => {
        match ($a, $b) {
            (CpuStorage::F32(_), CpuStorage::F32(_)) => f32::to_cpu_storage_owned(<$op>::run(
                slice::<f32>($a, $a_layout)?,
                slice::<f32>($b, $b_layout)?,
                $dims,
            )),
            (CpuStorage::F64(_), CpuStorage::F64(_)) => f64::to_cpu_storage_owned(<$op>::run(
                slice::<f64>($a, $a_layout)?,
                slice::<f64>($b, $b_layout)?,
                $dims,
            )),
            _ => bail!("an adapter's product expects two tensors of f32 or of f64"),
        }
    };
}

pub(super) struct Shrink;

impl Shrink {
    fn run<T: Accumulator>(xs: &[T], a: &[T], [tokens, width, rank]: [usize; 3]) -> Vec<T> {
        /// Rows that a thread handles at once.
        const ROWS: usize = 16;

        let mut ys = vec![T::default(); tokens * rank];
        if width == 0 || rank == 0 {
            return ys;
        }
        let chunks = ys
            .par_chunks_mut(ROWS * rank)
            .zip(xs.par_chunks(ROWS * width));
        chunks.for_each(|(ys, xs)| {
            vectorize(
                #[inline(always)]
                || {
                    for (ys, xs) in ys.chunks_exact_mut(rank).zip(xs.chunks_exact(width)) {
                        for (y, a) in ys.iter_mut().zip(a.chunks_exact(width)) {
                            *y = dot(xs, a);
                        }
                    }
                },
            );
        });
        ys
    }
}

impl CustomOp2 for Shrink {
    fn name(&self) -> &'static str {
        "lora-shrink"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = xs_layout.shape().dims2()?;
        let rank = a_layout.shape().dims2()?.0;
        let ys = over_floats!(Shrink, xs, xs_layout, a, a_layout, [tokens, width, rank]);
        Ok((ys, Shape::from((tokens, rank))))
    }
}

struct Outer;

impl Outer {
    fn run<T: Accumulator>(p: &[T], xs: &[T], [tokens, width, rank]: [usize; 3]) -> Vec<T> {
        /// Columns that a thread handles at once: `rank` such rows stay in the first cache.
        const COLUMNS: usize = 128;

        let mut ys = vec![T::default(); rank * width];
        if tokens == 0 || rank == 0 {
            return ys;
        }
        let starts = (0..width).into_par_iter().step_by(COLUMNS);
        let blocks = starts.map(|start| {
            let columns = COLUMNS.min(width - start);
            let mut block = vec![T::default(); rank * columns];
            vectorize(
                #[inline(always)]
                || {
                    for (p, xs) in p.chunks_exact(rank).zip(xs.chunks_exact(width)) {
                        let xs = &xs[start..start + columns];
                        for (p, ys) in p.iter().zip(block.chunks_exact_mut(columns)) {
                            for (y, x) in ys.iter_mut().zip(xs) {
                                *y = *y + *p * *x;
                            }
                        }
                    }
                },
            );
            (start, columns, block)
        });
        for (start, columns, block) in blocks.collect::<Vec<_>>() {
            for (ys, block) in ys.chunks_exact_mut(width).zip(block.chunks_exact(columns)) {
                ys[start..start + columns].copy_from_slice(block);
            }
        }
        ys
    }
}

impl CustomOp2 for Outer {
    fn name(&self) -> &'static str {
        "lora-outer"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        p_layout: &Layout,
        xs: &CpuStorage,
        xs_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = xs_layout.shape().dims2()?;
        let rank = p_layout.shape().dims2()?.1;
        let ys = over_floats!(Outer, p, p_layout, xs, xs_layout, [tokens, width, rank]);
        Ok((ys, Shape::from((rank, width))))
    }
}

/// Sixteen sums side by side, then the rest one by one.
#[inline(always)]
fn dot<T: Accumulator>(a: &[T], b: &[T]) -> T {
    const LANES: usize = 16;

    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [T::default(); LANES];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = *sum + *a * *b;
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| *a * *b);
    sums.into_iter()
        .chain(rest)
        .fold(T::default(), |sum, x| sum + x)
}
