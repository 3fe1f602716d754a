//! Where in a file a tensor's numbers lie, and the tensor made of them.

use std::io::{self, Read, Seek, SeekFrom};

use candle_core::{DType, Device, Tensor};

/// A tensor that a file holds, checked against the file's length but not yet read.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// The distance of neighbours along each axis, in elements.
    pub strides: Vec<usize>,
    /// The byte of the file at which the first element begins.
    pub start: u64,
}

/// More axes than any parameter has.
pub(super) const MAX_AXES: usize = 8;

impl Entry {
    /// A row-major tensor.
    pub fn contiguous(dtype: DType, shape: Vec<usize>, start: u64) -> Option<Self> {
        let strides = row_major(&shape)?;
        Some(Self {
            dtype,
            shape,
            strides,
            start,
        })
    }

    /// The bytes of its elements; `None` if no machine can hold them.
    pub fn bytes(&self) -> Option<u64> {
        bytes(&self.shape, self.dtype)
    }

    /// The elements from the first to the last, those between included.
    pub fn span(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape
            .iter()
            .zip(&self.strides)
            .try_fold(1_usize, |span, (&len, &stride)| {
                span.checked_add((len - 1).checked_mul(stride)?)
            })
    }

    /// Reads the tensor onto the CPU.
    pub fn read(&self, from: &mut (impl Read + Seek + ?Sized)) -> Result<Tensor, String> {
        let size = self.dtype.size_in_bytes();
        let too_large = || "is larger than memory".to_string();
        let len = self.span().and_then(|span| span.checked_mul(size));
        let mut bytes = vec![0; len.ok_or_else(too_large)?];
        let read: io::Result<()> = from
            .seek(SeekFrom::Start(self.start))
            .and_then(|_| from.read_exact(&mut bytes));
        read.map_err(|error| format!("can't be read: {error}"))?;
        if row_major(&self.shape).as_ref() != Some(&self.strides) {
            bytes = self.gathered(&bytes, size);
        }
        Tensor::from_raw_buffer(&bytes, self.dtype, &self.shape, &Device::Cpu)
            .map_err(|error| error.to_string())
    }

    /// The elements in row-major order.
    fn gathered(&self, bytes: &[u8], size: usize) -> Vec<u8> {
        let count = self.shape.iter().product::<usize>();
        let mut gathered = Vec::with_capacity(count * size);
        for index in 0..count {
            let (mut rest, mut at) = (index, 0);
            for (&len, &stride) in self.shape.iter().zip(&self.strides).rev() {
                at += rest % len * stride;
                rest /= len;
            }
            gathered.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        }
        gathered
    }
}

/// The bytes of a tensor's elements; `None` if no machine can hold them.
pub(super) fn bytes(shape: &[usize], dtype: DType) -> Option<u64> {
    let count = shape
        .iter()
        .try_fold(1_u64, |count, &len| count.checked_mul(len as u64))?;
    count.checked_mul(dtype.size_in_bytes() as u64)
}

/// The strides of a tensor whose last axis runs fastest.
pub(super) fn row_major(shape: &[usize]) -> Option<Vec<usize>> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].checked_mul(shape[axis].max(1))?;
    }
    Some(strides)
}

/// Whether every number is finite. Types without infinities pass.
pub(super) fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?.iter().all(|value| value.is_finite()),
        DType::F32 => flat.to_vec1::<f32>()?.iter().all(|value| value.is_finite()),
        DType::BF16 | DType::F16 => {
            let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            values.iter().all(|value| value.is_finite())
        }
        _ => true,
    })
}
