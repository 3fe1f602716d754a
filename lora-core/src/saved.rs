//! Parameters outside of linear layers that an adapter trains: scales of norms, embeddings.
//!
//! Their layers know one tensor each. So at most one adapter of a model can have them, and they
//! stand in the model while it is selected, the originals while it is not.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

use crate::{
    LoraTargets, ModulePath, Result, Visitor, nn::Linear, selection::Pick, switch::AdapterId,
    switch::Switch,
};

/// The parameters that one adapter of a model trains.
#[derive(Debug)]
pub(crate) struct SavedParameters {
    pub owner: AdapterId,
    /// Whether they stand in the model now.
    pub placed: bool,
    /// By `<module path>.<parameter>`; not empty.
    pub parameters: BTreeMap<String, SavedParameter>,
}

/// A parameter before and after.
#[derive(Clone, Debug)]
pub(crate) struct SavedParameter {
    pub original: Tensor,
    pub trained: Var,
}

impl SavedParameters {
    /// One of them, for a message.
    pub fn first_key(&self) -> &str {
        self.parameters.keys().next().map_or("", String::as_str)
    }
}

/// Puts the trained parameters in the model if their adapter is selected, else the originals.
pub(crate) fn settle<M: LoraTargets + ?Sized>(model: &mut M, switch: &Switch) -> Result<()> {
    let Some(owner) = switch.read().saved.as_ref().map(|saved| saved.owner) else {
        return Ok(());
    };
    let merged = merged_picks(model)?;
    let state = switch.read();
    let selected = match merged {
        Some(picks) => picks.iter().any(|pick| pick.id == owner),
        None => state.current.contains(owner),
    };
    let wanted = selected && !state.disabled;
    drop(state);
    place(model, switch, wanted)
}

/// Puts the trained parameters in the model, or the originals.
pub(crate) fn place<M: LoraTargets + ?Sized>(
    model: &mut M,
    switch: &Switch,
    placed: bool,
) -> Result<()> {
    let parameters = match &switch.read().saved {
        // Even if they are said to be there: it may have been another clone that they were put in.
        Some(saved) => saved.parameters.clone(),
        None => return Ok(()),
    };
    model.patch_linear(&mut ModulePath::root(), &mut Place { parameters, placed })?;
    if let Some(saved) = &mut switch.write().saved {
        saved.placed = placed;
    }
    Ok(())
}

struct Place {
    parameters: BTreeMap<String, SavedParameter>,
    placed: bool,
}

impl Visitor for Place {
    fn linear(&mut self, _: &ModulePath, _: &mut Linear) -> Result<()> {
        Ok(())
    }

    fn parameter(&mut self, path: &ModulePath, name: &str, tensor: &mut Tensor) -> Result<()> {
        if let Some(parameter) = self.parameters.get(&format!("{path}.{name}")) {
            *tensor = if self.placed {
                parameter.trained.as_tensor().clone()
            } else {
                parameter.original.clone()
            };
        }
        Ok(())
    }
}

/// The adapters that are in the weights, if the model is merged.
pub(crate) fn merged_picks<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Option<Vec<Pick>>> {
    let mut picks = None;
    model.for_each_linear(&mut |_, linear| {
        if picks.is_none() {
            picks = linear.merged_picks().map(<[Pick]>::to_vec);
        }
        Ok(())
    })?;
    Ok(picks)
}
