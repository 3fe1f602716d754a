//! Matrices as Hopper's copy engine sees them.

use std::ptr;

use cudarc::driver::DeviceRepr;
use cudarc::driver::sys::{
    CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use crate::element::{DType, Element};
use crate::error::{Error, Result};

/// Bytes of a row of a box: 64 halves, or 32 floats.
const BOX_ROW_BYTES: usize = 128;

/// A description of a matrix for the copy engine, passed to kernels by value.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub(crate) struct TensorMap([u64; 16]);

// SAFETY: plain words, the layout that the driver wrote.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// `[rows, cols]` at `address`, rows `stride` elements apart, in swizzled boxes whose rows have 128 bytes.
    pub fn new<T: Element>(
        address: u64,
        (rows, cols, stride): (usize, usize, usize),
        box_rows: usize,
    ) -> Result<Self> {
        let box_cols = BOX_ROW_BYTES / size_of::<T>();
        let swizzle = CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
        Self::boxes::<T>(address, (rows, cols, stride), (box_rows, box_cols), swizzle)
    }

    /// As [`Self::new`] for halves of 16, 32 or 64 columns, in boxes as wide.
    pub fn narrow<T: Element>(
        address: u64,
        (rows, cols, stride): (usize, usize, usize),
        box_rows: usize,
    ) -> Result<Self> {
        let (box_cols, swizzle) = match cols {
            0..=16 => (16, CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B),
            17..=32 => (32, CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B),
            _ => (64, CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B),
        };
        Self::boxes::<T>(address, (rows, cols, stride), (box_rows, box_cols), swizzle)
    }

    fn boxes<T: Element>(
        address: u64,
        (rows, cols, stride): (usize, usize, usize),
        (box_rows, box_cols): (usize, usize),
        swizzle: CUtensorMapSwizzle,
    ) -> Result<Self> {
        let mut map = Self([0; 16]);
        let dtype = match T::DTYPE {
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let (sizes, strides) = (
            [cols as u64, rows as u64],
            [(stride * size_of::<T>()) as u64],
        );
        let (box_size, steps) = ([box_cols as u32, box_rows as u32], [1, 1]);
        // SAFETY: the arrays have two, one, two and two elements, as rank 2 asks for; `map` is 128 bytes
        // aligned to 128 and only written.
        unsafe {
            cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                dtype,
                2,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_size.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(Error::driver("cuTensorMapEncodeTiled"))?;
        Ok(map)
    }
}
