//! Adapters in the dtype of the base, padded and laid out for the kernels.

use std::ops::Range;

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr};

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::launch::{Grid, Launcher, arg};
use crate::rows::{padded_rank, padded_width};

/// Matrices of one launch, as in pack.cu.
const JOBS: usize = 8;

/// Elements of a packed matrix that the kernel can count.
const MOST: usize = 1 << 33;

/// Where [`Launcher::pack`] takes a matrix from, and its size there and packed.
pub(crate) struct Source<'a, P> {
    pub data: &'a CudaView<'a, P>,
    pub rows: usize,
    pub cols: usize,
    pub transpose: bool,
    pub packed_rows: usize,
    pub packed_cols: usize,
}

impl<'a, P> Source<'a, P> {
    /// A `[rank, width]` as `[packed_rank, padded_width]`: ranks are rows.
    pub fn a_rows(data: &'a CudaView<'a, P>, rank: usize, width: usize) -> Self {
        Self {
            data,
            rows: rank,
            cols: width,
            transpose: false,
            packed_rows: padded_rank(rank),
            packed_cols: padded_width(width),
        }
    }

    /// A `[rank, width]` as `[padded_width, padded_rank]`: ranks are columns.
    pub fn a_cols(data: &'a CudaView<'a, P>, rank: usize, width: usize) -> Self {
        Self {
            transpose: true,
            packed_rows: padded_width(width),
            packed_cols: padded_rank(rank),
            ..Self::a_rows(data, rank, width)
        }
    }

    /// B `[width, rank]` as `[padded_rank, padded_width]`: ranks are rows.
    pub fn b_rows(data: &'a CudaView<'a, P>, rank: usize, width: usize) -> Self {
        Self {
            rows: width,
            cols: rank,
            transpose: true,
            ..Self::a_rows(data, rank, width)
        }
    }

    /// B `[width, rank]` as `[padded_width, padded_rank]`: ranks are columns.
    pub fn b_cols(data: &'a CudaView<'a, P>, rank: usize, width: usize) -> Self {
        Self {
            rows: width,
            cols: rank,
            transpose: false,
            ..Self::a_cols(data, rank, width)
        }
    }

    fn len(&self) -> usize {
        self.packed_rows * self.packed_cols
    }
}

/// Matrices packed one after the other.
#[derive(Debug)]
pub(crate) struct Matrices<T> {
    data: CudaSlice<T>,
    ranges: Vec<Range<usize>>,
}

impl<T> Matrices<T> {
    /// Matrix `index`, in the order of the sources.
    pub fn at(&self, index: usize) -> CudaView<'_, T> {
        self.data.slice(self.ranges[index].clone())
    }

    /// All matrices as one.
    pub fn all(&self) -> CudaView<'_, T> {
        self.data.as_view()
    }
}

impl Launcher<'_> {
    /// Every source in `T`, padded with zeros; zeroes the flags of the launches to come as well.
    pub fn pack<T: Element, P: Element>(
        &self,
        sources: &[Source<P>],
        flags: Option<&mut CudaSlice<u32>>,
    ) -> Result<Matrices<T>> {
        let function = self.function(
            Kernel::Pack,
            vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("SOURCE_F32", u32::from(P::DTYPE == DType::F32)),
            ],
        )?;
        let mut ranges = Vec::with_capacity(sources.len());
        let mut len = 0;
        for source in sources {
            if source.len() > MOST {
                return Err(Error::Shape {
                    what: "adapter",
                    expected: format!("at most {MOST} elements, padded"),
                    found: source.len().to_string(),
                });
            }
            ranges.push(len..len + source.len());
            len += source.len();
        }
        let mut data = self.alloc("packed adapters", len)?;
        let (at, _data) = data.device_ptr_mut(self.stream);
        let words = flags.as_ref().map_or(0, |flags| flags.len()) as i32;
        let flags = flags.map(|flags| flags.device_ptr_mut(self.stream));
        let flags_at = flags.as_ref().map_or(0, |(at, _)| *at);
        for (some, ranges) in sources.chunks(JOBS).zip(ranges.chunks(JOBS)) {
            let mut jobs = Jobs::default();
            let mut guards = Vec::new();
            for ((job, source), range) in jobs.0.iter_mut().zip(some).zip(ranges) {
                let (from, guard) = source.data.device_ptr(self.stream);
                guards.push(guard);
                *job = Job {
                    from,
                    to: at + (range.start * size_of::<T>()) as u64,
                    rows: source.rows as i32,
                    cols: source.cols as i32,
                    packed_rows: source.packed_rows as i32,
                    packed_cols: source.packed_cols as i32,
                    transpose: i32::from(source.transpose),
                    aligned: i32::from(
                        source.cols.is_multiple_of(4)
                            && from.is_multiple_of(4 * size_of::<P>() as u64),
                    ),
                };
            }
            let largest = some.iter().map(Source::len).max().unwrap_or(0);
            let blocks = largest.div_ceil(1024).clamp(1, 1024) as u32;
            let grid = Grid::new([blocks, some.len() as u32, 1], 256);
            let args = [arg(&jobs), arg(&flags_at), arg(&words)];
            // SAFETY: arguments in the order of pack.cu; sources were checked against rank and width,
            // destinations have the packed sizes of their jobs, the flags as many words.
            unsafe { self.launch("launch of pack", &function, grid, &args) }?;
        }
        drop(_data);
        Ok(Matrices { data, ranges })
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Job {
    from: u64,
    to: u64,
    rows: i32,
    cols: i32,
    packed_rows: i32,
    packed_cols: i32,
    transpose: i32,
    aligned: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Jobs([Job; JOBS]);

// SAFETY: plain words in the layout of `Jobs` in pack.cu.
unsafe impl DeviceRepr for Jobs {}
