//! Words by which the blocks of one launch wait for each other; zero before it.

use std::sync::Mutex;

use cudarc::driver::{CudaSlice, CudaViewMut};

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::hopper::{CLUSTER, TILE};
use crate::kernels::lock;
use crate::launch::Launcher;
use crate::tail;

/// The flags of a forward, and behind them those of its backward; none where no kernel uses them.
#[derive(Debug)]
pub(crate) struct Flags {
    words: Option<Mutex<Option<CudaSlice<u32>>>>,
    /// Words of a launch, as in flags.cuh.
    each: usize,
}

impl Flags {
    /// Room for the flags of `rows` tokens; the caller has it zeroed.
    pub fn new<T: Element>(launcher: &Launcher, rows: usize) -> Result<Self> {
        let used = launcher.kernels.arch() == "sm_90a" && T::DTYPE != DType::F32 && rows > 0;
        let clusters = launcher.kernels.multiprocessors() / CLUSTER;
        let each = 1 + 4 * rows.div_ceil(TILE) + tail::words(clusters);
        let words = used
            .then(|| launcher.alloc("flags", 2 * each))
            .transpose()?;
        Ok(Self {
            words: words.map(|words| Mutex::new(Some(words))),
            each,
        })
    }

    /// Runs `zero` on the words.
    pub fn zeroed_by<R>(&self, zero: impl FnOnce(Option<&mut CudaSlice<u32>>) -> R) -> R {
        let mut kept = self.words.as_ref().map(lock);
        zero(kept.as_mut().and_then(|kept| kept.as_mut()))
    }

    /// Runs `forward` with its words.
    pub fn forward<R>(&self, forward: impl FnOnce(Option<&mut CudaViewMut<u32>>) -> R) -> R {
        self.zeroed_by(|words| forward(words.map(|words| words.slice_mut(..self.each)).as_mut()))
    }

    /// Runs `backward` with its words. Those that were zeroed are for the first backward of a forward; any
    /// other has words of its own.
    pub fn backward<R>(
        &self,
        launcher: &Launcher,
        backward: impl FnOnce(Option<&mut CudaViewMut<u32>>) -> Result<R>,
    ) -> Result<R> {
        let Some(kept) = &self.words else {
            return backward(None);
        };
        let start = self.each;
        let first = lock(kept).take();
        let mut words = match first {
            Some(words) => words,
            None => launcher
                .stream
                .alloc_zeros(2 * start)
                .map_err(Error::driver("allocation"))?,
        };
        backward(Some(&mut words.slice_mut(start..)))
    }
}
