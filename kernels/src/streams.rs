//! Where kernels whose blocks wait for each other can be launched like any others.

use std::collections::HashMap;
use std::env;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUstreamCaptureStatus;

use crate::error::{Error, Result};
use crate::kernels::lock;

/// `CU_STREAM_PER_THREAD`, a handle that means another stream in each thread.
const PER_THREAD: usize = 2;

/// The stream of a device that asked first, with its thread if it is the per-thread stream. It is kept, for the
/// handle of a stream that is gone could be given to another while its last kernel runs.
type First = (Arc<CudaStream>, Option<ThreadId>);

/// Whether a kernel on `stream` whose blocks wait for each other ends without being started as a whole.
///
/// It ends only if all of its blocks come to run. Two such kernels could each hold the multiprocessors that
/// the other one's blocks need, unless the driver is asked to start all blocks of a kernel at once or none (a
/// cooperative launch), which costs microseconds: it keeps the kernel from starting while the one before it
/// drains. One stream can do without: what it waits for are kernels that end by themselves, or were started
/// as a whole. That is the stream that asks first on its device, unless it records a graph, which may run on
/// any other, or the card is shared with other processes, of which each has a first stream.
pub(crate) fn is_only(stream: &Arc<CudaStream>) -> Result<bool> {
    static FIRST: OnceLock<Mutex<HashMap<usize, First>>> = OnceLock::new();
    let status = stream
        .capture_status()
        .map_err(Error::driver("query of a stream"))?;
    if card_is_shared() || status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
        return Ok(false);
    }
    let handle = stream.cu_stream();
    let thread = (handle as usize == PER_THREAD).then(|| thread::current().id());
    let mut first = lock(FIRST.get_or_init(Mutex::default));
    let (kept, its_thread) = first
        .entry(stream.context().ordinal())
        .or_insert_with(|| (stream.clone(), thread));
    Ok(kept.cu_stream() == handle && *its_thread == thread)
}

/// Whether NVIDIA's Multi-Process Service runs here: the driver looks for its pipe at the same place.
fn card_is_shared() -> bool {
    static SHARED: OnceLock<bool> = OnceLock::new();
    *SHARED.get_or_init(|| {
        let pipes = env::var_os("CUDA_MPS_PIPE_DIRECTORY")
            .map_or_else(|| PathBuf::from("/tmp/nvidia-mps"), PathBuf::from);
        pipes.join("control").exists()
    })
}
