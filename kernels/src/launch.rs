//! Allocation and launch on a stream.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue_union__bindgen_ty_1,
    CUlaunchConfig, cuLaunchKernelEx, cuOccupancyMaxActiveClusters,
};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr};

use crate::element::Element;
use crate::error::{Error, Result};
use crate::kernels::{Instance, Kernel, Kernels};
use crate::rows::Rows;
use crate::streams;

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
    /// Blocks of a cluster, where the kernel leaves that to the launch.
    pub cluster: Option<u32>,
    /// Whether blocks wait for others of the launch, so that all have to come to run.
    pub waits: bool,
}

impl Grid {
    pub fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self {
            blocks,
            threads,
            shared_bytes: 0,
            cluster: None,
            waits: false,
        }
    }

    /// The launch on `stream` with `attributes`, into which the cluster goes first.
    fn config(&self, stream: &CudaStream, attributes: &mut [CUlaunchAttribute]) -> CUlaunchConfig {
        if let (Some(cluster), Some(first)) = (self.cluster, attributes.first_mut()) {
            first.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            first.value.clusterDim = CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: cluster,
                y: 1,
                z: 1,
            };
        }
        CUlaunchConfig {
            gridDimX: self.blocks[0],
            gridDimY: self.blocks[1],
            gridDimZ: self.blocks[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(self.cluster.is_some()),
        }
    }
}

/// The value of an argument, for [`Launcher::launch`].
pub(crate) fn arg<V: DeviceRepr>(value: &V) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

impl Launcher<'_> {
    /// Uninitialized device memory.
    pub fn alloc<T: DeviceRepr>(&self, what: &'static str, len: usize) -> Result<CudaSlice<T>> {
        if len == 0 {
            return self.stream.null().map_err(Error::driver("allocation"));
        }
        // SAFETY: every caller passes the memory to a kernel that writes what is read of it, before it is read.
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
        // SAFETY: attributes are plain words, all of which may be zero.
        let mut attributes: [CUlaunchAttribute; 3] = unsafe { std::mem::zeroed() };
        let mut config = grid.config(self.stream, &mut attributes);
        if self.kernels.overlaps() {
            let early = &mut attributes[config.numAttrs as usize];
            early.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            early.value.programmaticStreamSerializationAllowed = 1;
            config.numAttrs += 1;
        }
        let alone = streams::alone(self.stream, grid.waits)?;
        if grid.waits && alone.is_none() {
            let together = &mut attributes[config.numAttrs as usize];
            together.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            together.value.cooperative = 1;
            config.numAttrs += 1;
        }
        config.attrs = attributes.as_mut_ptr();
        // SAFETY: the configuration and its attributes live until the call returns; the arguments are
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
        .map_err(Error::driver(call))?;
        drop(alone);
        Ok(())
    }

    /// Clusters of `grid` that the card holds at once.
    pub fn active_clusters(&self, function: &CudaFunction, grid: Grid) -> Result<usize> {
        // SAFETY: as in `launch`.
        let mut attributes: [CUlaunchAttribute; 1] = unsafe { std::mem::zeroed() };
        let config = grid.config(self.stream, &mut attributes);
        let mut count = 0;
        // SAFETY: the configuration and its attribute live until the call returns; `count` is written.
        unsafe { cuOccupancyMaxActiveClusters(&mut count, function.cu_function(), &config) }
            .result()
            .map_err(Error::driver("query of the clusters"))?;
        Ok(count.max(1) as usize)
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
