//! Allocation and launch on a stream.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchConfig, cuLaunchKernelEx,
};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::kernels::{Instance, Kernel, Kernels};
use crate::rows::Rows;

/// The launches of one call, with their stream.
pub(crate) struct Launcher<'a> {
    pub kernels: &'a Kernels,
    pub stream: &'a Arc<CudaStream>,
}

/// Blocks, threads of a block and bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Grid {
    pub fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self {
            blocks,
            threads,
            shared_bytes: 0,
        }
    }
}

/// The value of an argument, for [`Launcher::launch`].
pub(crate) fn arg<V: DeviceRepr>(value: &V) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

impl Launcher<'_> {
    /// Uninitialized device memory.
    pub fn alloc<T: Element>(&self, what: &'static str, len: usize) -> Result<CudaSlice<T>> {
        if len == 0 {
            return self.stream.null().map_err(Error::driver("allocation"));
        }
        // SAFETY: every caller passes the memory to a kernel that writes all of it before it is read.
        unsafe { self.stream.alloc(len) }.map_err(Error::allocation(what, len * size_of::<T>()))
    }

    pub fn function(
        &self,
        kernel: Kernel,
        defines: Vec<(&'static str, u32)>,
    ) -> Result<CudaFunction> {
        self.kernels.function(Instance { kernel, defines }, 0)
    }

    /// Launches `function`; from Hopper on it may start while the kernel before it drains, which
    /// every kernel of this crate awaits before it reads what that kernel wrote, or writes itself.
    ///
    /// # Safety
    /// `args` are values of the types and in the order of the kernel's parameters, and the memory they
    /// point to is valid, and ordered on the stream, for what the kernel does with it.
    pub unsafe fn launch(
        &self,
        call: &'static str,
        function: &CudaFunction,
        grid: Grid,
        args: &[*mut c_void],
    ) -> Result<()> {
        self.stream
            .context()
            .bind_to_thread()
            .map_err(Error::driver("context switch"))?;
        // SAFETY: an attribute is plain words, all of which may be zero.
        let mut early: CUlaunchAttribute = unsafe { std::mem::zeroed() };
        early.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        early.value.programmaticStreamSerializationAllowed = 1;
        let config = CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.kernels.overlaps()),
        };
        // SAFETY: the configuration and its attribute live until the call returns; the arguments are
        // the caller's promise.
        unsafe {
            cuLaunchKernelEx(
                &config,
                function.cu_function(),
                args.as_ptr().cast_mut(),
                ptr::null_mut(),
            )
        }
        .result()
        .map_err(Error::driver(call))
    }

    /// Whether whole 16-byte vectors can be loaded from `rows`.
    pub fn aligned<T: Element>(&self, rows: &Rows<T>) -> bool {
        let vector = T::DTYPE.vector();
        self.address(&rows.data).is_multiple_of(16)
            && rows.stride.is_multiple_of(vector)
            && rows.cols.is_multiple_of(vector)
    }

    pub fn address<T>(&self, view: &CudaView<T>) -> u64 {
        view.device_ptr(self.stream).0
    }
}

/// `blocks` as the first dimension of a grid.
pub(crate) fn grid_x(blocks: usize) -> Result<u32> {
    u32::try_from(blocks)
        .ok()
        .filter(|&b| b <= i32::MAX as u32)
        .ok_or_else(|| Error::Shape {
            what: "blocks of a launch",
            expected: "at most 2147483647".into(),
            found: blocks.to_string(),
        })
}
