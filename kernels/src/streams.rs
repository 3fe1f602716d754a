//! The one stream of a device whose kernels may wait for blocks that do not run yet.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};
use std::thread::{self, ThreadId};

use cudarc::driver::CudaStream;

use crate::kernels::lock;

/// A stream, with its thread if it is the per-thread stream, whose handle means another one in each.
type Key = (usize, Option<ThreadId>);

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;

/// Whether this is the stream that asked first on its device.
///
/// A kernel whose blocks wait for each other ends only if all of them come to run. Two such kernels could
/// each hold the multiprocessors that the other one's blocks need, unless the driver is asked to start
/// all blocks of a kernel at once or none (a cooperative launch), which costs microseconds: it keeps the
/// kernel from starting while the one before it drains. One stream can do without: what it waits for are
/// kernels that end by themselves, or were started as a whole.
pub(crate) fn is_first(stream: &CudaStream) -> bool {
    static FIRST: OnceLock<Mutex<HashMap<usize, Key>>> = OnceLock::new();
    let handle = stream.cu_stream() as usize;
    let key = (
        handle,
        (handle == PER_THREAD).then(|| thread::current().id()),
    );
    let mut first = lock(FIRST.get_or_init(Mutex::default));
    *first.entry(stream.context().ordinal()).or_insert(key) == key
}
