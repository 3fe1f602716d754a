//! The base models that adapters were trained on, and the one that they are merged into.

use std::collections::BTreeMap;

use crate::{
    Error, Result,
    adapter::{AdapterWeights, Fingerprint, Sample},
};

/// The base of one adapter.
#[derive(Clone, Debug)]
pub(super) struct Base {
    fingerprint: Fingerprint,
    /// The paths of the adapted layers, and what the model calls their weights.
    layers: Vec<(String, String)>,
}

impl Base {
    /// That of `adapter`, if it tells.
    pub fn of(adapter: &AdapterWeights) -> Option<Self> {
        Some(Self {
            fingerprint: adapter.origin.fingerprint.clone()?,
            layers: adapter
                .layers
                .keys()
                .map(|path| (path.clone(), format!("{path}.weight")))
                .collect(),
        })
    }

    /// The same with other names for the weights.
    pub fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        let layers = self.layers.iter();
        Self {
            fingerprint: self.fingerprint.clone(),
            layers: layers
                .map(|(path, name)| (path.clone(), rename(name)))
                .collect(),
        }
    }

    /// Whether the weight that the model calls `name` is one of the adapted layers'.
    pub fn has(&self, name: &str) -> bool {
        self.layers.iter().any(|(_, own)| own == name)
    }

    /// Checks the weights that were merged into, if all of them are known.
    pub fn check(&self, merged_into: &BTreeMap<String, Sample>) -> Result<()> {
        let sample = |(path, name): &'_ (String, String)| {
            let sample = merged_into.get(name)?;
            Some((path.clone(), sample.clone()))
        };
        let Some(samples) = self.layers.iter().map(sample).collect::<Option<Vec<_>>>() else {
            return Ok(());
        };
        let samples = samples
            .iter()
            .map(|(path, sample)| (&**path, sample.clone()));
        let ours = Fingerprint::of_samples(samples.collect());
        if ours == self.fingerprint {
            return Ok(());
        }
        Err(Error::Adapter(format!(
            "the adapter was trained on another base, whose fingerprint is {}; this one's is {ours}. \
             To merge it all the same, clear `origin.fingerprint` of what `AdapterWeights::read` gives \
             (`lora merge --any-base` does)",
            self.fingerprint
        )))
    }
}
