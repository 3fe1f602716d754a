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
struct Device {
    /// The one stream that does, with its thread if it is the per-thread stream; none if there are more, or others
    /// that are not known. It is kept, for the handle of a stream that is gone could be given to another.
    only: Option<(Arc<CudaStream>, Option<ThreadId>)>,
    /// Whether that stream has launched a kernel whose blocks wait for each other, which nobody has awaited.
    unawaited: bool,
}

/// Holds other streams back from a first launch on the device of one.
pub(crate) struct Alone {
    _device: MutexGuard<'static, Device>,
}

/// Whether a kernel on `stream` whose blocks wait for each other ends without being started as a whole, if it is
/// launched before the return value is dropped. To be asked of every launch, whether its blocks wait or not.
///
/// It ends only if all of its blocks come to run. Blocks that wait could hold the multiprocessors that another such
/// kernel needs, and a kernel that is to be started as a whole could hold back the blocks that they wait for. So
/// the driver is asked to start all blocks of such a kernel at once or none (a cooperative launch), which costs
/// microseconds: it keeps the kernel from starting while the one before it drains. A device that one stream has for
/// itself can do without: what the kernel waits for are kernels of its stream that end by themselves.
///
/// When a second stream comes, it awaits what the device has to do, and from then on both ask. So they do once a
/// stream records a graph, which may run beside any other, or where the card is shared with other processes.
pub(crate) fn alone(stream: &Arc<CudaStream>, waits: bool) -> Result<Option<Alone>> {
    let handle = stream.cu_stream();
    let thread = (handle as usize == PER_THREAD).then(|| thread::current().id());
    let mut device = lock(device_of(stream, thread));
    let Device { only, unawaited } = &mut *device;
    if only.is_none() && !*unawaited {
        return Ok(None);
    }
    let status = stream
        .capture_status()
        .map_err(Error::driver("query of a stream"))?;
    let records = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let is_only = |(only, its_thread): &(Arc<CudaStream>, _)| {
        only.cu_stream() == handle && *its_thread == thread
    };
    if !records && only.as_ref().is_some_and(is_only) {
        *unawaited |= waits;
        return Ok(Some(Alone { _device: device }));
    }
    *only = None;
    if *unawaited && !records {
        let wait = stream.context().synchronize();
        wait.map_err(Error::driver("wait for the first stream"))?;
        *unawaited = false;
    }
    Ok(None)
}

/// The device of `stream`, which is its only stream if there was none. Each has a lock of its own: a launch may wait
/// for what another device has yet to be given.
fn device_of(stream: &Arc<CudaStream>, thread: Option<ThreadId>) -> &'static Mutex<Device> {
    static DEVICES: OnceLock<Mutex<HashMap<usize, &'static Mutex<Device>>>> = OnceLock::new();
    let mut devices = lock(DEVICES.get_or_init(Mutex::default));
    devices
        .entry(stream.context().ordinal())
        .or_insert_with(|| {
            Box::leak(Box::new(Mutex::new(Device {
                only: (!card_is_shared()).then(|| (stream.clone(), thread)),
                unawaited: false,
            })))
        })
}

/// Whether NVIDIA's Multi-Process Service runs here: the driver looks for its pipe at the same place.
fn card_is_shared() -> bool {
    let pipes = env::var_os("CUDA_MPS_PIPE_DIRECTORY")
        .map_or_else(|| PathBuf::from("/tmp/nvidia-mps"), PathBuf::from);
    pipes.join("control").exists()
}
