//! Adapters in the weights.

use std::collections::HashMap;

use super::roster::switch;
use crate::{
    Error, LoraTargets, Result,
    join::switch_of,
    saved::settle,
    selection::{Choice, Pick},
};

/// The body of [`LoraTargets::merge`].
pub(crate) fn merge_active<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    let choice = switch.read().current.clone();
    merge_choice(model, &choice)
}

/// The body of [`LoraTargets::merge_adapters`].
pub(crate) fn merge<M: LoraTargets + ?Sized>(
    model: &mut M,
    names: &[impl AsRef<str>],
) -> Result<()> {
    let switch = switch(model)?;
    let names = names.iter().map(|name| (name.as_ref(), 1.0));
    let choice = switch.read().sum(names)?;
    merge_choice(model, &choice)
}

/// Merges every layer that has any adapter, so that none goes on with what is selected.
fn merge_choice<M: LoraTargets + ?Sized>(model: &mut M, choice: &Choice) -> Result<()> {
    let Choice::Sum(picks) = choice else {
        return Err(Error::MixedBatch);
    };
    let parts = |picks: &[Pick]| -> Vec<_> {
        let parts = picks.iter().map(|pick| (pick.id, pick.weight.to_bits()));
        parts.collect()
    };
    let mut merged = HashMap::new();
    model.for_each_linear(&mut |path, linear| {
        match (linear.merged_picks(), linear.adapted()) {
            (Some(others), _) if parts(others) != parts(picks) => return Err(Error::Merged),
            (None, Some(lora)) => drop(merged.insert(path.to_string(), lora.merged(picks)?)),
            _ => {}
        }
        Ok(())
    })?;
    if merged.is_empty() {
        return Ok(());
    }
    let switch = switch(model)?;
    model.for_each_linear(&mut |path, linear| {
        if let Some(merged) = merged.remove(path.as_str()) {
            linear.set_merged(merged, picks);
        }
        Ok(())
    })?;
    settle(model, &switch)
}

/// The body of [`LoraTargets::unmerge`].
pub(crate) fn unmerge<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    model.for_each_linear(&mut |_, linear| {
        linear.unmerge();
        Ok(())
    })?;
    match switch_of(model)? {
        Some(switch) => settle(model, &switch),
        None => Ok(()),
    }
}
