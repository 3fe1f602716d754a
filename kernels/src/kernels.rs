//! `Kernels`: what one context needs, compiled once and kept.

use std::collections::HashMap;
use std::panic;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum};
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use crate::cubin::{self, Compiler, Request};
use crate::error::{Error, Result};
use crate::gemm::Blas;
use crate::path::Preference;

/// The kernels of one CUDA context: compiled at first use for the card found, kept in memory and on
/// disk (`$LORA_KERNELS_CACHE`, else the user's cache folder). Cheap to share between threads.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    arch: &'static str,
    multiprocessors: usize,
    compiler: Compiler,
    functions: Mutex<HashMap<Instance, CudaFunction>>,
    clusters: Mutex<HashMap<(Instance, u32), usize>>,
    blas: Blas,
    preference: Preference,
}

/// A source with its options.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Instance {
    pub kernel: Kernel,
    pub defines: Vec<(&'static str, u32)>,
}

/// The sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Pack,
    Shrink,
    ShrinkRing,
    Expand,
    Outer,
    Reduce,
    Sweep,
    Bits,
    Gemm,
    Decode,
}

impl Kernel {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pack => "pack",
            Self::Shrink => "shrink",
            Self::ShrinkRing => "shrink_ring",
            Self::Expand => "expand",
            Self::Outer => "outer",
            Self::Reduce => "reduce",
            Self::Sweep => "sweep",
            Self::Bits => "bits",
            Self::Gemm => "gemm",
            Self::Decode => "decode",
        }
    }

    pub fn source(self) -> &'static str {
        macro_rules! joined {
            ($file:literal, $($header:literal),+) => {
                concat!(
                    $(include_str!(concat!("cuda/", $header)), "\n",)+
                    "#line 1 \"",
                    $file,
                    "\"\n",
                    include_str!(concat!("cuda/", $file))
                )
            };
        }
        macro_rules! with_tile {
            ($file:literal) => {
                joined!($file, "types.cuh", "machine.cuh", "tile.cuh")
            };
        }
        macro_rules! with_hopper {
            ($file:literal) => {
                joined!(
                    $file,
                    "types.cuh",
                    "machine.cuh",
                    "tile.cuh",
                    "hopper.cuh",
                    "bits.cuh"
                )
            };
        }
        match self {
            Self::Pack => with_tile!("pack.cu"),
            Self::Shrink => with_tile!("shrink.cu"),
            Self::Expand => with_tile!("expand.cu"),
            Self::Outer => with_tile!("outer.cu"),
            Self::Reduce => joined!(
                "reduce.cu",
                "types.cuh",
                "machine.cuh",
                "tile.cuh",
                "sum.cuh"
            ),
            Self::ShrinkRing => {
                joined!(
                    "shrink_ring.cu",
                    "types.cuh",
                    "machine.cuh",
                    "tile.cuh",
                    "hopper.cuh",
                    "bits.cuh"
                )
            }
            Self::Sweep => joined!(
                "sweep.cu",
                "types.cuh",
                "machine.cuh",
                "tile.cuh",
                "hopper.cuh",
                "bits.cuh",
                "wgmma.cuh",
                "cluster_sum.cuh"
            ),
            Self::Bits => with_hopper!("bits.cu"),
            Self::Gemm => joined!(
                "gemm.cu",
                "types.cuh",
                "machine.cuh",
                "tile.cuh",
                "hopper.cuh",
                "bits.cuh",
                "wgmma.cuh",
                "gemm.cuh",
                "math.cuh",
                "walk.cuh",
                "output.cuh",
                "flags.cuh",
                "down.cuh",
                "making.cuh",
                "tail.cuh",
                "rank.cuh",
                "sum.cuh",
                "side.cuh"
            ),
            Self::Decode => joined!(
                "decode.cu",
                "types.cuh",
                "machine.cuh",
                "tile.cuh",
                "hopper.cuh",
                "wgmma.cuh"
            ),
        }
    }
}

impl Kernels {
    /// Prepares the kernels of `context`; each compiles when it is first needed.
    ///
    /// # Errors
    /// [`Error::UnsupportedArch`] before Ampere, [`Error::MissingLibrary`] without NVRTC or cuBLASLt.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let (major, minor) = context
            .compute_capability()
            .map_err(Error::driver("query of the compute capability"))?;
        let arch = arch(major, minor).ok_or(Error::UnsupportedArch { major, minor })?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context
            .attribute(count)
            .map_err(Error::driver("query of the multiprocessors"))?
            as usize;
        Ok(Self {
            context: context.clone(),
            arch,
            multiprocessors,
            compiler: Compiler::new(cubin::default_dir())?,
            functions: Mutex::default(),
            clusters: Mutex::default(),
            blas: Blas::new(context)?,
            preference: Preference::default(),
        })
    }

    /// The kernels of `context`, prepared at the first call and shared from then on.
    ///
    /// # Errors
    /// Those of [`Kernels::new`].
    pub fn shared(context: &Arc<CudaContext>) -> Result<Arc<Self>> {
        static SHARED: OnceLock<Mutex<HashMap<usize, Arc<Kernels>>>> = OnceLock::new();
        let mut shared = lock(SHARED.get_or_init(Mutex::default));
        let key = context.cu_ctx() as usize;
        if let Some(kernels) = shared.get(&key) {
            return Ok(kernels.clone());
        }
        let kernels = Arc::new(Self::new(context)?);
        shared.insert(key, kernels.clone());
        Ok(kernels)
    }

    /// The same kernels, choosing paths by `preference`.
    pub fn prefer(self, preference: Preference) -> Self {
        Self { preference, ..self }
    }

    /// Architecture that the kernels are compiled for, for example `sm_90a`.
    pub fn arch(&self) -> &str {
        self.arch
    }

    pub(crate) fn blas(&self) -> &Blas {
        &self.blas
    }

    pub(crate) fn preference(&self) -> Preference {
        self.preference
    }

    /// Whether kernels may start while the one before them drains: from Hopper on.
    pub(crate) fn overlaps(&self) -> bool {
        !self.arch.starts_with("sm_8")
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// How many clusters of `size` blocks of `instance` the card holds, asked of `query` once.
    pub(crate) fn clusters(
        &self,
        instance: &Instance,
        size: u32,
        query: impl FnOnce() -> Result<usize>,
    ) -> Result<usize> {
        let mut clusters = lock(&self.clusters);
        let key = (instance.clone(), size);
        if let Some(&count) = clusters.get(&key) {
            return Ok(count);
        }
        let count = query()?;
        clusters.insert(key, count);
        Ok(count)
    }

    /// The function of `instance`, allowed `shared_bytes` of dynamic shared memory.
    pub(crate) fn function(&self, instance: Instance, shared_bytes: usize) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(&instance) {
            return Ok(function.clone());
        }
        let Instance { kernel, defines } = &instance;
        let request = Request {
            kernel: kernel.name(),
            source: kernel.source(),
            arch: self.arch,
            defines,
        };
        let cubin = self.compiler.cubin(&request)?;
        let module = self
            .context
            .load_module(Ptx::from_binary(cubin))
            .map_err(Error::driver("module load"))?;
        let function = module
            .load_function(kernel.name())
            .map_err(Error::driver("function load"))?;
        // A multiprocessor has to drain before it divides its memory anew: those without shared memory
        // take the division of those with much, which come before and after them.
        if matches!(kernel, Kernel::Pack | Kernel::Reduce | Kernel::Bits) {
            let share =
                CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            function
                .set_attribute(share, 100)
                .map_err(Error::driver("shared memory preference"))?;
        }
        if shared_bytes > 48 * 1024 {
            let limit = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(limit, shared_bytes as i32)
                .map_err(Error::driver("shared memory limit"))?;
        }
        functions.insert(instance, function.clone());
        Ok(function)
    }
}

/// The first device's context, or none where there is no driver or no device.
///
/// Never panics; meant for tests and examples that run anywhere.
pub fn first_device() -> Option<Arc<CudaContext>> {
    panic::catch_unwind(|| CudaContext::new(0).ok())
        .ok()
        .flatten()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Newer cards run the code of the newest architecture of their own generation known here.
fn arch(major: i32, minor: i32) -> Option<&'static str> {
    Some(match (major, minor) {
        (8, 0) => "sm_80",
        (8, 6) => "sm_86",
        (8, 7) => "sm_87",
        (8, 9) => "sm_89",
        (9, 0) => "sm_90a",
        (10, 0) => "sm_100",
        (10, 3) => "sm_103",
        (11, 0) => "sm_110",
        (12, 0) => "sm_120",
        (12, 1) => "sm_121",
        _ => return None,
    })
}
