//! Where kernels whose blocks wait for each other can be launched like any others.

use std::collections::HashMap;
use std::env;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};
use std::thread::{self, ThreadId};

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUstreamCaptureStatus;

use crate::kernels::lock;

/// A stream, with its thread if it is the per-thread stream, whose handle means another one in each.
type Key = (usize, Option<ThreadId>);

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;

/// Whether a kernel on `stream` whose blocks wait for each other ends without being started as a whole.
///
/// It ends only if all of its blocks come to run. Two such kernels could each hold the multiprocessors that
/// the other one's blocks need, unless the driver is asked to start all blocks of a kernel at once or none (a
/// cooperative launch), which costs microseconds: it keeps the kernel from starting while the one before it
/// drains. One stream can do without: what it waits for are kernels that end by themselves, or were started
/// as a whole. That is the stream that asks first on its device, unless it records a graph, which may run on
/// any other, or the card is shared with other processes, of which each has a first stream.
pub(crate) fn is_only(stream: &CudaStream) -> bool {
    static FIRST: OnceLock<Mutex<HashMap<usize, Key>>> = OnceLock::new();
    let idle = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    if card_is_shared() || stream.capture_status().is_ok_and(|status| status != idle) {
        return false;
    }
    let handle = stream.cu_stream() as usize;
    let thread = (handle == PER_THREAD).then(|| thread::current().id());
    let key = (handle, thread);
    let mut first = lock(FIRST.get_or_init(Mutex::default));
    *first.entry(stream.context().ordinal()).or_insert(key) == key
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
