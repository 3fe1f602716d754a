//! What a switch keeps behind its lock.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::AdapterId;
use crate::{
    BiasMode, Error, ModulePath, Result,
    adapter::{AdapterWeights, Origin},
    saved::SavedParameters,
    selection::{Choice, Pick},
    suggest::nearest_names,
};

/// The names of a model's adapters, and what is selected.
#[derive(Debug)]
pub(crate) struct State {
    ids: HashMap<Arc<str>, AdapterId>,
    adapters: BTreeMap<AdapterId, Entry>,
    pub current: Choice,
    pub disabled: bool,
    pub saved: Option<SavedParameters>,
}

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

impl State {
    pub(super) fn new() -> Self {
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
                let reason = format!("is unknown; nearest: {}", nearest_names(name, names));
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

    pub(super) fn deleted<'a>(&self, choice: &'a Choice) -> Option<&'a Pick> {
        let mut picks = choice.picks();
        picks.find(|pick| !self.adapters.contains_key(&pick.id))
    }

    /// An error if `choice` needs other parameters outside of linear layers than the model has.
    pub(super) fn agrees(&self, choice: &Choice) -> Result<()> {
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
