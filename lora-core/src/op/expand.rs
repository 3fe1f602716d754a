//! `Y += s · mask ∘ (P Q)` for a thin `P [rows, rank]` and `Q [rank, width]`: the adapter's side
//! added to the base's, row by row, with one rounding.

use candle_core::{
    CpuStorage, DType, InplaceOp3, Layout, Result, Tensor, backend::BackendStorage, bail,
};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::{Mask, nn::cpu::vectorize};

/// The operation; `P` and `Q` are of the compute type, `Y` may be of a half type.
pub(crate) struct Expand {
    pub scaling: f64,
    pub mask: Option<Mask>,
}

impl Expand {
    /// `ys + s · mask ∘ (p q)`; reuses the memory of `ys` on the CPU.
    pub fn add(&self, ys: Tensor, p: &Tensor, q: &Tensor) -> Result<Tensor> {
        if ys.device().is_cpu() {
            ys.inplace_op3(p, q, self)?;
            return Ok(ys);
        }
        let delta = self.scale(p.matmul(q)?)?;
        (ys.to_dtype(delta.dtype())? + delta)?.to_dtype(ys.dtype())
    }

    /// `s · mask ∘ delta`
    fn scale(&self, delta: Tensor) -> Result<Tensor> {
        let delta = (delta * self.scaling)?;
        match &self.mask {
            Some(mask) => mask.apply(&delta),
            None => Ok(delta),
        }
    }

    fn rows<T: Rounded<A>, A: Accumulator>(
        &self,
        ys: &mut [T],
        p: &[A],
        q: &[A],
        (rank, width): (usize, usize),
    ) {
        /// Elements of `Y` that a thread handles at once.
        const CHUNK: usize = 32 * 1024;

        let scaling = A::from_f64(self.scaling);
        let rows = (CHUNK / width).max(1);
        let chunks = ys
            .par_chunks_mut(rows * width)
            .zip(p.par_chunks(rows * rank));
        chunks.enumerate().for_each(|(chunk, (ys, p))| {
            vectorize(
                #[inline(always)]
                || {
                    let mut delta = vec![A::default(); width];
                    let rows_of_chunk = ys.chunks_exact_mut(width).zip(p.chunks_exact(rank));
                    for (row, (ys, p)) in rows_of_chunk.enumerate() {
                        combine(&mut delta, p, q);
                        if let Some(mask) = &self.mask {
                            let row = (chunk * rows + row) as u64;
                            mask.row(row, width, |column, factor| {
                                delta[column] = delta[column] * A::from_f64(f64::from(factor));
                            });
                        }
                        for (y, delta) in ys.iter_mut().zip(&delta) {
                            *y = y.plus(scaling * *delta);
                        }
                    }
                },
            );
        });
    }
}

impl InplaceOp3 for Expand {
    fn name(&self) -> &'static str {
        "lora-expand"
    }

    fn cpu_fwd(
        &self,
        ys: &mut CpuStorage,
        ys_layout: &Layout,
        p: &CpuStorage,
        p_layout: &Layout,
        q: &CpuStorage,
        q_layout: &Layout,
    ) -> Result<()> {
        let (Some(ys_range), Some(p_range), Some(q_range)) = (
            ys_layout.contiguous_offsets(),
            p_layout.contiguous_offsets(),
            q_layout.contiguous_offsets(),
        ) else {
            bail!("lora-expand expects contiguous tensors")
        };
        let shape = q_layout.shape().dims2()?; // [rank, width]
        macro_rules! rows {
            ($ys:expr, $p:expr, $q:expr) => {
                self.rows(
                    &mut $ys[ys_range.0..ys_range.1],
                    &$p[p_range.0..p_range.1],
                    &$q[q_range.0..q_range.1],
                    shape,
                )
            };
        }
        if ys_layout.shape().elem_count() == 0 {
            return Ok(());
        }
        match (ys, p, q) {
            (CpuStorage::F32(ys), CpuStorage::F32(p), CpuStorage::F32(q)) => rows!(ys, p, q),
            (CpuStorage::F64(ys), CpuStorage::F64(p), CpuStorage::F64(q)) => rows!(ys, p, q),
            (CpuStorage::BF16(ys), CpuStorage::F32(p), CpuStorage::F32(q)) => rows!(ys, p, q),
            (CpuStorage::F16(ys), CpuStorage::F32(p), CpuStorage::F32(q)) => rows!(ys, p, q),
            (ys, p, _) => bail!(
                "lora-expand: no way to add {:?} to {:?}",
                p.dtype(),
                ys.dtype()
            ),
        }
        Ok(())
    }
}

/// The type in which the adapter's side of a layer with this base is computed.
pub(crate) fn compute_dtype(base: DType) -> DType {
    match base {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// `delta = p Q` for one row `p` of `P`.
#[inline(always)]
fn combine<A: Accumulator>(delta: &mut [A], p: &[A], q: &[A]) {
    let width = delta.len();
    delta.fill(A::default());
    // Four rows of Q at a time, so that `delta` is read and written a quarter as often.
    let (fours, ones) = p.as_chunks::<4>();
    for (p, q) in fours.iter().zip(q.chunks_exact(4 * width)) {
        let (q01, q23) = q.split_at(2 * width);
        let ((q0, q1), (q2, q3)) = (q01.split_at(width), q23.split_at(width));
        let rows = q0.iter().zip(q1).zip(q2.iter().zip(q3));
        for (delta, ((q0, q1), (q2, q3))) in delta.iter_mut().zip(rows) {
            *delta = *delta + (p[0] * *q0 + p[1] * *q1) + (p[2] * *q2 + p[3] * *q3);
        }
    }
    for (p, q) in ones
        .iter()
        .zip(q[4 * fours.len() * width..].chunks_exact(width))
    {
        for (delta, q) in delta.iter_mut().zip(q) {
            *delta = *delta + *p * *q;
        }
    }
}

/// A type to compute in.
pub(super) trait Accumulator:
    Copy + Default + Send + Sync + std::ops::Add<Output = Self> + std::ops::Mul<Output = Self>
{
    fn from_f64(value: f64) -> Self;
}

impl Accumulator for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Accumulator for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// A type to round sums to.
trait Rounded<A>: Copy + Send + Sync {
    fn plus(self, delta: A) -> Self;
}

impl<A: Accumulator> Rounded<A> for A {
    #[inline(always)]
    fn plus(self, delta: A) -> Self {
        self + delta
    }
}

impl Rounded<f32> for bf16 {
    #[inline(always)]
    fn plus(self, delta: f32) -> Self {
        Self::from_f32(self.to_f32() + delta)
    }
}

impl Rounded<f32> for f16 {
    #[inline(always)]
    fn plus(self, delta: f32) -> Self {
        Self::from_f32(self.to_f32() + delta)
    }
}
