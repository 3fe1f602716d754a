//! What the adapted layers of one model share: which adapters there are, and which act.

mod state;

use std::sync::{
    Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use candle_core::bail;

use crate::{
    Error, Result,
    selection::{Choice, scoped},
};

pub(crate) use state::{About, Entry, State};

/// An adapter, whatever it is called. Ids grow in the order of addition and never come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AdapterId(u64);

impl AdapterId {
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The name of an adapter that is given none.
pub(crate) const DEFAULT: &str = "default";

/// The names of a model's adapters and what is selected, behind one lock.
#[derive(Debug)]
pub(crate) struct Switch {
    state: RwLock<State>,
    /// Layers that are merged.
    merged: AtomicUsize,
    /// Set when no layer listens any more.
    closed: AtomicBool,
}

impl Switch {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::new(State::new()),
            merged: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        })
    }

    // No code panics while it holds the lock, so that a poisoned state is a whole one.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the calling thread's forward pass selects.
    pub fn choice(self: &Arc<Self>) -> candle_core::Result<Choice> {
        self.open()?;
        let scoped = scoped(self)?;
        let state = self.read();
        if state.disabled {
            return Ok(Choice::none());
        }
        let Some(choice) = scoped else {
            if let Err(error) = state.agrees(&state.current) {
                bail!("{error}")
            }
            return Ok(state.current.clone());
        };
        if let Some(pick) = state.deleted(&choice) {
            bail!(
                "the adapter `{}` of this selection is not there any more; select again",
                pick.name
            )
        }
        if let Err(error) = state.agrees(&choice) {
            bail!("{error}")
        }
        Ok(choice)
    }

    /// Whether a merged layer computes with the merged weight for the calling thread, or with the
    /// base's.
    pub fn acts_merged(self: &Arc<Self>) -> candle_core::Result<bool> {
        self.open()?;
        let scoped = scoped(self)?;
        let state = self.read();
        match scoped {
            _ if state.disabled => Ok(false),
            None => Ok(true),
            Some(choice) if choice.is_none() => match state.agrees(&choice) {
                Ok(()) => Ok(false),
                Err(error) => bail!("{error}"),
            },
            Some(_) => bail!("the adapters are merged; `unmerge` before selecting others"),
        }
    }

    fn open(&self) -> candle_core::Result<()> {
        if self.is_closed() {
            bail!("the adapters of this layer were taken off through a clone of the model")
        }
        Ok(())
    }

    /// Makes `choice` what is selected wherever no scope says otherwise.
    pub fn set(&self, choice: Choice) -> Result<()> {
        self.unmerged()?;
        let mut state = self.write();
        if let Some(pick) = state.deleted(&choice) {
            let reason = "is not there any more; select again";
            return Err(Error::adapter(&pick.name, reason));
        }
        state.agrees(&choice)?;
        state.current = choice;
        Ok(())
    }

    /// An error while a layer is merged.
    pub fn unmerged(&self) -> Result<()> {
        if self.is_merged() {
            return Err(Error::Merged);
        }
        Ok(())
    }

    pub fn is_merged(&self) -> bool {
        self.merged.load(Ordering::Acquire) > 0
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Says that no layer listens any more, and forgets all adapters: a selection of them that is
    /// still in use is an error.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        *self.write() = State::new();
    }
}

/// Counts a layer as merged while it lives.
#[derive(Debug)]
pub(crate) struct MergedLayer(Arc<Switch>);

impl MergedLayer {
    pub fn new(switch: &Arc<Switch>) -> Self {
        switch.merged.fetch_add(1, Ordering::AcqRel);
        Self(switch.clone())
    }
}

impl Clone for MergedLayer {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for MergedLayer {
    fn drop(&mut self) {
        self.0.merged.fetch_sub(1, Ordering::AcqRel);
    }
}
