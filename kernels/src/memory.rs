//! The driver's memory pool, from which streams allocate.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUmemPool_attribute::{
    self, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
    CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use cudarc::driver::sys::CUmemoryPool;
use cudarc::driver::{CudaContext, result};

use crate::error::{Error, Result};

/// The memory pool of a device, shared by everything in the process that allocates on streams.
#[derive(Debug)]
pub struct MemoryPool {
    pool: CUmemoryPool,
}

impl MemoryPool {
    /// The pool of the context's device.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device has no such pool.
    pub fn of(context: &Arc<CudaContext>) -> Result<Self> {
        // SAFETY: the context keeps its device.
        let pool = unsafe { result::device::get_mem_pool(context.cu_device()) }
            .map_err(Error::driver("query of the memory pool"))?;
        Ok(Self { pool })
    }

    /// Bytes in use.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn used(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    /// The most bytes that were in use at once since the last [`reset_peak`](Self::reset_peak).
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn peak(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Makes what is in use now the peak.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn reset_peak(&self) -> Result<()> {
        self.set(CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    /// Lets the pool keep up to `bytes` of freed memory for the process, instead of giving all of it
    /// back whenever a stream is waited for (the driver's default), after which every allocation has
    /// to map memory anew.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn keep_freed(&self, bytes: u64) -> Result<()> {
        self.set(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, bytes)
    }

    fn get(&self, attribute: CUmemPool_attribute) -> Result<u64> {
        let mut value = 0_u64;
        // SAFETY: the pool is a device's; these attributes are 64-bit numbers.
        unsafe {
            result::mem_pool::get_attribute(self.pool, attribute, ptr::from_mut(&mut value).cast())
        }
        .map_err(Error::driver("query of the memory pool"))?;
        Ok(value)
    }

    fn set(&self, attribute: CUmemPool_attribute, mut value: u64) -> Result<()> {
        // SAFETY: as in `get`.
        unsafe {
            result::mem_pool::set_attribute(self.pool, attribute, ptr::from_mut(&mut value).cast())
        }
        .map_err(Error::driver("change of the memory pool"))
    }
}
