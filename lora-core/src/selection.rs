//! Which adapters act in a forward pass.

use std::{cell::RefCell, ops::Range, sync::Arc};

use candle_core::bail;

use crate::switch::{AdapterId, Switch};

/// Which adapters of a model act in a forward pass: none, the sum of several, or one for each row
/// of a batch.
///
/// [`Adapters`](crate::Adapters) makes one from names; it is small, cheap to clone and belongs to
/// that model. It acts where [`Adapters::set`](crate::Adapters::set) puts it, for every thread, or
/// while [`scope`](Self::scope) runs, for one.
///
/// In a batch by rows, the first dimension of the input of every adapted layer must be a multiple
/// of the number of rows; each row has its share of it, in order. Rows without an adapter are the
/// base's, bit for bit.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lora_core::{LoraTargets, PeftConfig, Selection, nn::Linear};
///
/// let dev = Device::Cpu;
/// let mut layer = Linear::new(Tensor::randn(0f32, 1.0, (3, 4), &dev)?, None);
/// let xs = Tensor::randn(0f32, 1.0, (2, 4), &dev)?;
/// let base = layer.forward(&xs)?.to_vec2::<f32>()?;
/// for name in ["french", "legal"] {
///     layer.add_adapter(name, &PeftConfig::all_linear().dim(2))?;
///     for var in layer.adapter_vars(name)? {
///         var.set(&var.randn_like(0.0, 1.0)?)?;
///     }
/// }
///
/// let adapters = layer.adapters()?;
/// let mixed = adapters.rows(&[None, Some("legal")])?.scope(|| layer.forward(&xs))?;
/// let legal = adapters.select(&["legal"])?.scope(|| layer.forward(&xs))?;
/// assert_eq!(mixed.to_vec2::<f32>()?[0], base[0]);
/// assert_ne!(mixed.to_vec2::<f32>()?[1], base[1]);
/// let error = (mixed.get(1)? - legal.get(1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Selection {
    /// Whose adapters it names; `None`: everybody's.
    switch: Option<Arc<Switch>>,
    choice: Choice,
}

thread_local! {
    /// The scopes that this thread is in, the innermost last.
    static SCOPES: RefCell<Vec<Selection>> = const { RefCell::new(Vec::new()) };
}

impl Selection {
    /// No adapter of any model.
    pub fn none() -> Self {
        Self {
            switch: None,
            choice: Choice::none(),
        }
    }

    pub(crate) fn new(switch: &Arc<Switch>, choice: Choice) -> Self {
        Self {
            switch: Some(switch.clone()),
            choice,
        }
    }

    /// The names of the adapters in it, each once, as they were when it was made.
    pub fn names(&self) -> Vec<&str> {
        self.choice.picks().map(|pick| &*pick.name).collect()
    }

    /// Runs `run` with this selection on the calling thread: other threads, such as those that
    /// `run` starts, do not notice. The scope that it is in takes over again when `run` is over,
    /// be it by a panic. A scope does not enable what
    /// [`disable_adapters`](crate::LoraTargets::disable_adapters) turned off.
    pub fn scope<R>(&self, run: impl FnOnce() -> R) -> R {
        struct Leave;

        impl Drop for Leave {
            fn drop(&mut self) {
                // Out of the borrow before it is dropped.
                drop(SCOPES.with_borrow_mut(Vec::pop));
            }
        }

        SCOPES.with_borrow_mut(|scopes| scopes.push(self.clone()));
        let _leave = Leave;
        run()
    }

    /// The choice, if it is for the adapters of `switch`.
    pub(crate) fn choice_for(&self, switch: &Arc<Switch>) -> Option<&Choice> {
        match &self.switch {
            Some(own) if !Arc::ptr_eq(own, switch) => None,
            _ => Some(&self.choice),
        }
    }
}

/// What the innermost scope of the calling thread that concerns `switch` selects.
pub(crate) fn scoped(switch: &Arc<Switch>) -> candle_core::Result<Option<Choice>> {
    SCOPES.with_borrow(|scopes| {
        for selection in scopes.iter().rev() {
            if let Some(choice) = selection.choice_for(switch) {
                return Ok(Some(choice.clone()));
            }
            if selection.switch.as_ref().is_some_and(|own| own.is_closed()) {
                bail!(
                    "the selection of {:?} is of a model whose adapters were taken off, or joined \
                     with those of the model around it; make another with `adapters()`",
                    selection.names()
                )
            }
        }
        Ok(None)
    })
}

/// What a selection says, with names resolved.
#[derive(Clone, Debug)]
pub(crate) enum Choice {
    /// The sum of these, in their order; of none, the base.
    Sum(Arc<[Pick]>),
    Rows(Arc<Rows>),
}

/// An adapter, its name when it was picked, and what its output is multiplied by beside its
/// scaling.
#[derive(Clone, Debug)]
pub(crate) struct Pick {
    pub id: AdapterId,
    pub name: Arc<str>,
    pub weight: f64,
}

/// A batch of rows with at most one adapter each.
#[derive(Debug)]
pub(crate) struct Rows {
    pub count: usize,
    /// The adapters in the order of their first row, with their rows.
    pub parts: Vec<(Pick, Vec<Range<usize>>)>,
}

impl Choice {
    pub fn none() -> Self {
        Self::Sum(Arc::from([]))
    }

    pub fn rows(picks: &[Option<Pick>]) -> Self {
        let mut parts = Vec::<(Pick, Vec<Range<usize>>)>::new();
        for (row, pick) in picks.iter().enumerate() {
            let Some(pick) = pick else { continue };
            let known = parts.iter().position(|(other, _)| other.id == pick.id);
            let place = known.unwrap_or(parts.len());
            if known.is_none() {
                parts.push((pick.clone(), Vec::new()));
            }
            match parts[place].1.last_mut() {
                Some(last) if last.end == row => last.end += 1,
                _ => parts[place].1.push(row..row + 1),
            }
        }
        Self::Rows(Arc::new(Rows {
            count: picks.len(),
            parts,
        }))
    }

    pub fn is_none(&self) -> bool {
        self.picks().next().is_none()
    }

    /// The adapters in it, each once.
    pub fn picks(&self) -> impl Iterator<Item = &Pick> {
        let (sum, rows) = match self {
            Self::Sum(picks) => (&picks[..], &[][..]),
            Self::Rows(rows) => (&[][..], &rows.parts[..]),
        };
        sum.iter().chain(rows.iter().map(|(pick, _)| pick))
    }

    pub fn contains(&self, id: AdapterId) -> bool {
        self.picks().any(|pick| pick.id == id)
    }

    /// Whether an adapter acts on all rows (`true`) or on none; `None` if it is on some.
    pub fn has_on_all_rows(&self, id: AdapterId) -> Option<bool> {
        match self {
            Self::Rows(rows) if self.contains(id) => rows.single().map(|_| true),
            _ => Some(self.contains(id)),
        }
    }

    /// The same choice after a change of name.
    pub fn renamed(&self, id: AdapterId, name: &Arc<str>) -> Self {
        let renamed = |pick: &Pick| Pick {
            id: pick.id,
            name: if pick.id == id { name } else { &pick.name }.clone(),
            ..*pick
        };
        match self {
            Self::Sum(picks) => Self::Sum(picks.iter().map(renamed).collect()),
            Self::Rows(rows) => Self::Rows(Arc::new(Rows {
                count: rows.count,
                parts: rows
                    .parts
                    .iter()
                    .map(|(pick, ranges)| (renamed(pick), ranges.clone()))
                    .collect(),
            })),
        }
    }
}

impl Rows {
    /// The adapter of every row, if it is the same.
    pub fn single(&self) -> Option<&Pick> {
        match &self.parts[..] {
            [(pick, ranges)] => match &ranges[..] {
                [all] if *all == (0..self.count) => Some(pick),
                _ => None,
            },
            _ => None,
        }
    }
}
