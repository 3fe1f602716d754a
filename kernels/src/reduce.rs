//! Gradients of adapters from partial sums.

use std::ops::Range;

use cudarc::driver::{CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::launch::{Grid, Launcher, arg};
use crate::skinny::Partial;

/// Gradients of one launch, as in reduce.cu.
const JOBS: usize = 8;
/// Elements that a warp adds up, at most.
const UNIT: usize = 32;
const THREADS: u32 = 256;

/// A gradient of the adapter to write, or to add to.
pub(crate) struct Gradient<'a> {
    at: u64,
    _written: SyncOnDrop<'a>,
    rank: usize,
    /// `[cols, rank]`, not `[rank, cols]`.
    transpose: bool,
    f32: bool,
    accumulate: bool,
}

impl<'a> Gradient<'a> {
    /// Of A, `[rank, in_features]`.
    pub fn of_a<P: Element>(
        launcher: &'a Launcher,
        view: &'a mut CudaViewMut<P>,
        rank: usize,
        accumulate: bool,
    ) -> Self {
        let (at, written) = view.device_ptr_mut(launcher.stream);
        Self {
            at,
            _written: written,
            rank,
            transpose: false,
            f32: P::DTYPE == DType::F32,
            accumulate,
        }
    }

    /// Of B, `[out_features, rank]`.
    pub fn of_b<P: Element>(
        launcher: &'a Launcher,
        view: &'a mut CudaViewMut<P>,
        rank: usize,
        accumulate: bool,
    ) -> Self {
        Self {
            transpose: true,
            ..Self::of_a(launcher, view, rank, accumulate)
        }
    }

    /// The sum of `splits` partial sums `[ranks, cols]` from `part` on, of the columns `made`.
    pub fn sum(
        &self,
        part: u64,
        splits: usize,
        (ranks, cols): (usize, usize),
        made: Range<usize>,
    ) -> SumArg {
        SumArg {
            part,
            grad: self.at,
            stride: (ranks * cols) as i64,
            splits: splits as i32,
            rank: self.rank as i32,
            cols: cols as i32,
            first_col: made.start as i32,
            end_col: made.end as i32,
            transpose: i32::from(self.transpose),
            f32: i32::from(self.f32),
            accumulate: i32::from(self.accumulate),
        }
    }
}

/// A gradient and where its partial sums are.
pub(crate) struct Sum<'a> {
    pub partial: &'a Partial,
    /// The adapter's first rank among those of `partial`.
    pub first_rank: usize,
    pub gradient: &'a Gradient<'a>,
}

impl<'a> Sum<'a> {
    pub fn new(partial: &'a Partial, gradient: &'a Gradient<'a>) -> Self {
        Self {
            partial,
            first_rank: 0,
            gradient,
        }
    }

    /// The argument, with the address of the partial sums.
    pub fn arg(&self, part: u64) -> SumArg {
        let Partial {
            splits,
            ranks,
            cols,
            ref made,
            ..
        } = *self.partial;
        let part = part + (self.first_rank * cols * size_of::<f32>()) as u64;
        self.gradient.sum(part, splits, (ranks, cols), made.clone())
    }
}

impl Launcher<'_> {
    /// Writes the gradients, or adds to them. `T` is the dtype of the base.
    pub fn reduce<T: Element>(&self, sums: &[Sum]) -> Result<()> {
        if sums.is_empty() {
            return Ok(());
        }
        let defines = vec![("DTYPE", T::DTYPE.define()), ("ALIGNED", 1)];
        let function = self.function(Kernel::Reduce, defines)?;
        for some in sums.chunks(JOBS) {
            let mut jobs = Jobs::default();
            let mut guards = Vec::new();
            let mut largest = 0;
            for (job, sum) in jobs.0.iter_mut().zip(some) {
                let (part, guard) = sum.partial.part.device_ptr(self.stream);
                guards.push(guard);
                largest = largest.max(sum.gradient.rank * sum.partial.made.len());
                *job = sum.arg(part);
            }
            let blocks = largest.div_ceil(UNIT * THREADS as usize / 32);
            let blocks = blocks.clamp(1, 4096) as u32;
            let grid = Grid::new([blocks, some.len() as u32, 1], THREADS);
            let args = [arg(&jobs)];
            // SAFETY: arguments in the order of reduce.cu; the partial sums have the sizes of their
            // jobs, the gradients were checked to have rank * cols elements.
            unsafe { self.launch("launch of reduce", &function, grid, &args) }?;
        }
        Ok(())
    }
}

/// Laid out as in sum.cuh.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct SumArg {
    part: u64,
    grad: u64,
    stride: i64,
    splits: i32,
    rank: i32,
    cols: i32,
    first_col: i32,
    end_col: i32,
    transpose: i32,
    f32: i32,
    accumulate: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Jobs([SumArg; JOBS]);

// SAFETY: plain words in the layout of `Jobs` in reduce.cu.
unsafe impl DeviceRepr for Jobs {}
