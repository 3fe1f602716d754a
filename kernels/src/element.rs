//! The element types the kernels are built for.

use cudarc::cublaslt::sys::cudaDataType_t;
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

/// An element type of activations, weights or adapters: `f32`, [`struct@bf16`] or [`struct@f16`].
pub trait Element:
    sealed::Sealed + DeviceRepr + ValidAsZeroBits + Copy + Default + Send + Sync + 'static
{
    /// The type as a value.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

/// An [`Element`] as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// bfloat16: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// 16-bit IEEE float.
    F16,
}

impl DType {
    /// Size of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Elements in the 16 bytes that a thread loads at once.
    pub(crate) const fn vector(self) -> usize {
        16 / self.bytes()
    }

    /// Value of the `DTYPE` option of the sources.
    pub(crate) const fn define(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
        }
    }

    pub(crate) const fn cuda_type(self) -> cudaDataType_t {
        match self {
            Self::F32 => cudaDataType_t::CUDA_R_32F,
            Self::Bf16 => cudaDataType_t::CUDA_R_16BF,
            Self::F16 => cudaDataType_t::CUDA_R_16F,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}
