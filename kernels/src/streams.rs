//! Where kernels whose blocks wait for each other can be launched like any others.

use std::collections::HashMap;
use std::env;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, ThreadId};

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUstreamCaptureStatus;

use crate::error::{Error, Result};
use crate::kernels::lock;

/// `CU_STREAM_PER_THREAD`, a handle that means another stream in each thread.
const PER_THREAD: usize = 2;

/// Who launches on a device.
enum Device {
    /// One stream, with its thread if it is the per-thread stream. It is kept, for the handle of a stream that is gone
    /// could be given to another.
    OfOne(Arc<CudaStream>, Option<ThreadId>),
    /// More of them, or others that are not known.
    Shared,
}

/// Holds other streams back from a first launch on the device of one.
pub(crate) struct Alone {
    _devices: MutexGuard<'static, HashMap<usize, Device>>,
}

/// Whether a kernel on `stream` whose blocks wait for each other ends without being started as a whole, if it is
/// launched before the return value is dropped. To be asked of every launch.
///
/// It ends only if all of its blocks come to run. Blocks that wait could hold the multiprocessors that another such
/// kernel needs, and a kernel that is to be started as a whole could hold back the blocks that they wait for. So
/// the driver is asked to start all blocks of such a kernel at once or none (a cooperative launch), which costs
/// microseconds: it keeps the kernel from starting while the one before it drains. A device that one stream has for
/// itself can do without: what the kernel waits for are kernels of its stream that end by themselves.
///
/// When a second stream comes, it awaits what the first has launched, and from then on both ask. So they do where
/// the stream records a graph, which may run beside any other, or the card is shared with other processes.
pub(crate) fn alone(stream: &Arc<CudaStream>) -> Result<Option<Alone>> {
    static DEVICES: OnceLock<Mutex<HashMap<usize, Device>>> = OnceLock::new();
    let mut devices = lock(DEVICES.get_or_init(Mutex::default));
    let handle = stream.cu_stream();
    let thread = (handle as usize == PER_THREAD).then(|| thread::current().id());
    let device =
        devices
            .entry(stream.context().ordinal())
            .or_insert_with(|| match card_is_shared() {
                true => Device::Shared,
                false => Device::OfOne(stream.clone(), thread),
            });
    let Device::OfOne(first, its_thread) = device else {
        return Ok(None);
    };
    let status = stream
        .capture_status()
        .map_err(Error::driver("query of a stream"))?;
    let records = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    if first.cu_stream() == handle && *its_thread == thread && !records {
        return Ok(Some(Alone { _devices: devices }));
    }
    if !records {
        let wait = stream.context().synchronize();
        wait.map_err(Error::driver("wait for the first stream"))?;
    }
    *device = Device::Shared;
    Ok(None)
}

/// Whether NVIDIA's Multi-Process Service runs here: the driver looks for its pipe at the same place.
fn card_is_shared() -> bool {
    let pipes = env::var_os("CUDA_MPS_PIPE_DIRECTORY")
        .map_or_else(|| PathBuf::from("/tmp/nvidia-mps"), PathBuf::from);
    pipes.join("control").exists()
}
