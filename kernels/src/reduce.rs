//! Gradients of adapters from partial sums.

use cudarc::driver::{CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::launch::{Grid, Launcher, arg};
use crate::skinny::Partial;

/// Gradients of one launch, as in reduce.cu.
const JOBS: usize = 8;
const ELEMENTS: usize = 64;
const THREADS: u32 = 256;

/// A gradient and where its partial sums are.
pub(crate) struct Sum<'a, 'b, P> {
    pub partial: &'a Partial,
    /// The adapter's first rank among those of `partial`.
    pub first_rank: usize,
    pub rank: usize,
    /// The gradient is `[cols, rank]`, not `[rank, cols]`.
    pub transpose: bool,
    pub grad: &'a mut CudaViewMut<'b, P>,
}

impl Launcher<'_> {
    /// Writes the gradients, or adds to them, and zeroes `flags`. `T` is the dtype of the base.
    pub fn reduce<T: Element, P: Element>(
        &self,
        sums: &mut [Sum<P>],
        accumulate: bool,
        flags: Option<&mut CudaViewMut<u32>>,
    ) -> Result<()> {
        let function = self.function(
            Kernel::Reduce,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("GRAD_F32", u32::from(P::DTYPE == DType::F32)),
                ("ACCUMULATE", u32::from(accumulate)),
            ],
        )?;
        let words = flags.as_ref().map_or(0, |flags| flags.len()) as i32;
        let flags = flags.map(|flags| flags.device_ptr_mut(self.stream));
        let flags_at = flags.as_ref().map_or(0, |(at, _)| *at);
        for some in sums.chunks_mut(JOBS) {
            let mut jobs = Jobs::default();
            let mut guards = Vec::new();
            let (count, mut largest) = (some.len() as u32, 0);
            for (job, sum) in jobs.0.iter_mut().zip(some) {
                let Sum {
                    partial,
                    first_rank,
                    rank,
                    transpose,
                    ref mut grad,
                } = *sum;
                let (part, part_guard) = partial.part.device_ptr(self.stream);
                let (grad, grad_guard) = grad.device_ptr_mut(self.stream);
                guards.extend([part_guard, grad_guard]);
                largest = largest.max(rank * partial.cols);
                *job = Job {
                    part: part + (first_rank * partial.cols * size_of::<f32>()) as u64,
                    grad,
                    stride: (partial.ranks * partial.cols) as i64,
                    splits: partial.splits as i32,
                    rank: rank as i32,
                    cols: partial.cols as i32,
                    transpose: i32::from(transpose),
                };
            }
            let blocks = largest.div_ceil(4 * ELEMENTS).clamp(1, 4096) as u32;
            let grid = Grid::new([blocks, count, 1], THREADS);
            let args = [arg(&jobs), arg(&flags_at), arg(&words)];
            // SAFETY: arguments in the order of reduce.cu; the partial sums have the sizes of their
            // jobs, the gradients were checked to have rank * cols elements, the flags have their words.
            unsafe { self.launch("launch of reduce", &function, grid, &args) }?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Job {
    part: u64,
    grad: u64,
    stride: i64,
    splits: i32,
    rank: i32,
    cols: i32,
    transpose: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Jobs([Job; JOBS]);

// SAFETY: plain words in the layout of `Jobs` in reduce.cu.
unsafe impl DeviceRepr for Jobs {}
