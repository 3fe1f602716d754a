//! What the adapted layers of one model share: which adapters there are, and which act.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use candle_core::bail;

use crate::{
    BiasMode, Error, ModulePath, Result,
    adapter::{AdapterWeights, Origin},
    saved::SavedParameters,
    selection::{Choice, Pick, scoped},
    suggest::nearest_names,
};

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

/// What the switch knows of an adapter.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: Arc<str>,
    pub about: About,
    /// Paths of the linear layers in whose place it has a weight or a bias of its own; no two
    /// adapters that do so at one layer can be summed.
    pub replaces: BTreeSet<String>,
}

impl Entry {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            about: About::default(),
            replaces: BTreeSet::new(),
        }
    }
}

/// What an adapter folder says of an adapter beside its tensors.
#[derive(Clone, Debug, Default)]
pub(crate) struct About {
    pub bias: BiasMode,
    pub modules_to_save: Vec<String>,
    pub origin: Origin,
}

impl From<&AdapterWeights> for About {
    fn from(weights: &AdapterWeights) -> Self {
        Self {
            bias: weights.bias,
            modules_to_save: weights.modules_to_save.clone(),
            origin: weights.origin.clone(),
        }
    }
}

/// The names of a model's adapters and what is selected, behind one lock.
#[derive(Debug)]
pub(crate) struct Switch {
    state: RwLock<State>,
    /// Layers that are merged.
    merged: AtomicUsize,
    /// Set when no layer listens any more.
    closed: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct State {
    ids: HashMap<Arc<str>, AdapterId>,
    adapters: BTreeMap<AdapterId, Entry>,
    pub current: Choice,
    pub disabled: bool,
    pub saved: Option<SavedParameters>,
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

impl State {
    fn new() -> Self {
        Self {
            ids: HashMap::new(),
            adapters: BTreeMap::new(),
            current: Choice::none(),
            disabled: false,
            saved: None,
        }
    }

    /// The adapters in the order of addition.
    pub fn adapters(&self) -> impl Iterator<Item = (AdapterId, &Entry)> {
        self.adapters.iter().map(|(id, entry)| (*id, entry))
    }

    pub fn pick(&self, name: &str) -> Result<Pick> {
        match self.ids.get_key_value(name) {
            Some((name, id)) => Ok(Pick {
                id: *id,
                name: name.clone(),
                weight: 1.0,
            }),
            None => {
                let names = self.adapters.values().map(|entry| &*entry.name);
                let reason = format!("is unknown; {}", nearest_names(name, names));
                Err(Error::adapter(name, reason))
            }
        }
    }

    /// The name of an adapter; empty if it is unknown.
    pub fn name(&self, id: AdapterId) -> &str {
        self.adapters.get(&id).map_or("", |entry| &entry.name)
    }

    /// What is known of an adapter.
    pub fn about(&self, id: AdapterId) -> About {
        let entry = self.adapters.get(&id);
        entry.map(|entry| entry.about.clone()).unwrap_or_default()
    }

    pub fn set_about(&mut self, id: AdapterId, about: About) {
        if let Some(entry) = self.adapters.get_mut(&id) {
            entry.about = about;
        }
    }

    /// The sum of the adapters with these names, each times a weight.
    pub fn sum<'a>(&self, parts: impl IntoIterator<Item = (&'a str, f64)>) -> Result<Choice> {
        let mut picks = Vec::<Pick>::new();
        for (name, weight) in parts {
            let pick = Pick {
                weight,
                ..self.pick(name)?
            };
            if picks.iter().any(|other| other.id == pick.id) {
                return Err(Error::adapter(name, "is named twice"));
            }
            let replaces = self.replaces(pick.id);
            if !weight.is_finite() {
                let reason = format!("has the weight {weight}; it must be finite");
                return Err(Error::adapter(name, reason));
            }
            if weight != 1.0
                && let Some(key) = &replaces.first()
            {
                let reason = format!("replaces `{key}`, so that its weight can only be 1");
                return Err(Error::adapter(name, reason));
            }
            for other in &picks {
                if let Some(key) = self.replaces(other.id).intersection(&replaces).next() {
                    let other = &other.name;
                    let reason = format!("can't be summed with `{other}`: both replace `{key}`");
                    return Err(Error::adapter(name, reason));
                }
            }
            picks.push(pick);
        }
        Ok(Choice::Sum(picks.into()))
    }

    /// Parameters of the base in whose place the adapter has others.
    fn replaces(&self, id: AdapterId) -> BTreeSet<&str> {
        let entry = self.adapters.get(&id).into_iter();
        let keys = entry.flat_map(|entry| entry.replaces.iter().map(String::as_str));
        let saved = self.saved.iter().filter(|saved| saved.owner == id);
        keys.chain(saved.flat_map(|saved| saved.parameters.keys().map(String::as_str)))
            .collect()
    }

    /// An error if `name` can't be that of a new adapter.
    pub fn check_new(&self, name: &str) -> Result<()> {
        if self.ids.contains_key(name) {
            let reason = "is there already; delete or rename that one, or choose another name";
            return Err(Error::adapter(name, reason));
        }
        // It becomes a folder and a part of tensor names.
        let forbidden = |c: char| matches!(c, '.' | '/' | '\\') || c.is_control();
        if name.is_empty() || name.contains(forbidden) {
            let reason = "can't be a name: it must not be empty, nor have a dot, a slash or a \
                          control character";
            return Err(Error::adapter(name.escape_debug(), reason));
        }
        Ok(())
    }

    /// Notes that an adapter replaces parameters of the linear layer at `path`.
    pub fn add_replaced(&mut self, id: AdapterId, path: &ModulePath) {
        if let Some(entry) = self.adapters.get_mut(&id) {
            entry.replaces.insert(path.to_string());
        }
    }

    pub fn insert(&mut self, id: AdapterId, entry: Entry) {
        self.ids.insert(entry.name.clone(), id);
        self.adapters.insert(id, entry);
    }

    /// Forgets an adapter. If none is active then, the one that was added first is.
    pub fn remove(&mut self, id: AdapterId) {
        if let Some(entry) = self.adapters.remove(&id) {
            self.ids.remove(&entry.name);
        }
        let Choice::Sum(picks) = &self.current else {
            return;
        };
        if picks.iter().all(|pick| pick.id != id) {
            return;
        }
        let mut rest: Vec<Pick> = picks.iter().filter(|p| p.id != id).cloned().collect();
        if rest.is_empty() {
            let first = self.adapters.first_key_value();
            rest.extend(first.map(|(id, entry)| Pick {
                id: *id,
                name: entry.name.clone(),
                weight: 1.0,
            }));
        }
        self.current = Choice::Sum(rest.into());
    }

    pub fn rename(&mut self, id: AdapterId, name: &str) {
        let name = Arc::<str>::from(name);
        if let Some(entry) = self.adapters.get_mut(&id) {
            self.ids.remove(&entry.name);
            entry.name = name.clone();
            self.ids.insert(name.clone(), id);
        }
        self.current = self.current.renamed(id, &name);
    }

    fn deleted<'a>(&self, choice: &'a Choice) -> Option<&'a Pick> {
        let mut picks = choice.picks();
        picks.find(|pick| !self.adapters.contains_key(&pick.id))
    }

    /// An error if `choice` needs other parameters outside of linear layers than the model has.
    fn agrees(&self, choice: &Choice) -> Result<()> {
        let Some(saved) = &self.saved else {
            return Ok(());
        };
        match choice.has_on_all_rows(saved.owner) {
            // Enabling puts in place what is selected then.
            Some(_) if self.disabled => Ok(()),
            Some(selected) if selected == saved.placed => Ok(()),
            _ => {
                let name = self.name(saved.owner);
                let reason = format!(
                    "trains `{}`, which is no linear layer's and is switched by `set_adapter`, \
                     `disable_adapters` and the like only, on all rows of a batch alike",
                    saved.first_key()
                );
                Err(Error::adapter(name, reason))
            }
        }
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
