//! What can go wrong on the device, each with the way out.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::element::DType;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a kernel, its compilation or its arguments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The card lacks the tensor core instructions used here, or is newer than this crate.
    #[error(
        "compute capability {major}.{minor} is not among those the kernels are compiled for (8.0 to 12.1); \
         run this layer without fused kernels"
    )]
    UnsupportedArch {
        /// Major compute capability found.
        major: i32,
        /// Minor compute capability found.
        minor: i32,
    },

    /// A CUDA library could not be opened.
    #[error(
        "{library} could not be loaded ({reason}): install the CUDA toolkit (12.4 or newer) or its \
         Python wheels, and put the folder that holds the library on the loader's search path"
    )]
    MissingLibrary {
        /// Name of the library without prefix and suffix.
        library: &'static str,
        /// What the loader said.
        reason: String,
    },

    /// NVRTC rejected a kernel.
    #[error(
        "kernel `{kernel}` did not compile for {arch} with NVRTC {nvrtc}: update the CUDA toolkit if it is older \
         than 12.4, else report this log\n{log}"
    )]
    Compile {
        /// Kernel that was compiled.
        kernel: &'static str,
        /// Architecture asked for, for example `sm_90a`.
        arch: String,
        /// Version of NVRTC.
        nvrtc: String,
        /// The compiler's log.
        log: String,
    },

    /// Device memory ran out.
    #[error(
        "out of device memory while allocating {bytes} bytes for {what}: lower the batch size or the sequence length"
    )]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },

    /// The driver refused a call.
    #[error(
        "{call} failed: {source}; an error of an earlier kernel can surface here: rerun with CUDA_LAUNCH_BLOCKING=1"
    )]
    Driver {
        /// What was being done.
        call: &'static str,
        /// The driver's error.
        source: DriverError,
    },

    /// cuBLASLt refused a product.
    #[error(
        "cuBLASLt: {call} failed with {status} for {shape}; update the CUDA libraries or run without fused kernels"
    )]
    Blas {
        /// Function that failed.
        call: &'static str,
        /// Its status.
        status: String,
        /// The product.
        shape: String,
    },

    /// Two sizes do not fit.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// Which size.
        what: &'static str,
        /// What it has to be.
        expected: String,
        /// What it is.
        found: String,
    },

    /// Adapters are neither in f32 nor in the dtype of the base.
    #[error(
        "adapters in {adapter:?} under a base in {base:?}: keep adapters in f32 or in the dtype of the base"
    )]
    AdapterDType {
        /// Dtype of the adapters.
        adapter: DType,
        /// Dtype of the base weight.
        base: DType,
    },

    /// A member of a group has dropout on its input.
    #[error(
        "dropout on the input differs by member of a group: run such layers one by one, or drop their outputs instead"
    )]
    GroupedDropout,

    /// A dropout probability outside [0, 1).
    #[error("dropout probability {0}: must be at least 0 and less than 1")]
    Probability(f64),
}

impl Error {
    /// Wraps a driver error met while doing `call`.
    pub(crate) fn driver(call: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |source| Self::Driver { call, source }
    }

    /// Wraps a driver error met while allocating.
    pub(crate) fn allocation(what: &'static str, bytes: usize) -> impl FnOnce(DriverError) -> Self {
        move |source| match source.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory { what, bytes },
            _ => Self::Driver {
                call: "allocation",
                source,
            },
        }
    }
}

/// Fails with [`Error::Shape`] unless `found == expected`.
pub(crate) fn expect_size(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape {
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}
