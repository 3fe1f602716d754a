//! Adapters in the weights.

use std::collections::HashMap;

use super::roster::switch;
use crate::{
    Error, LoraTargets, Result,
    join::switch_of,
    saved::{merged_picks, settle},
    selection::{Choice, Pick},
};

/// The body of [`LoraTargets::merge`].
pub(crate) fn merge_active<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    let picks = match &switch.read().current {
        Choice::Sum(picks) => picks.to_vec(),
        Choice::Rows(_) => return Err(Error::MixedBatch),
    };
    match merged_picks(model)? {
        Some(merged) if same(&merged, &picks) => Ok(()),
        Some(_) => Err(Error::Merged),
        None => merge_picks(model, &picks),
    }
}

/// The body of [`LoraTargets::merge_adapters`].
pub(crate) fn merge<M: LoraTargets + ?Sized>(
    model: &mut M,
    names: &[impl AsRef<str>],
) -> Result<()> {
    let switch = switch(model)?;
    let picks = match switch.read().sum(names)? {
        Choice::Sum(picks) => picks.to_vec(),
        Choice::Rows(_) => return Err(Error::MixedBatch),
    };
    match merged_picks(model)? {
        Some(merged) if same(&merged, &picks) => Ok(()),
        Some(_) => Err(Error::Merged),
        None => merge_picks(model, &picks),
    }
}

fn same(one: &[Pick], two: &[Pick]) -> bool {
    one.iter()
        .map(|pick| pick.id)
        .eq(two.iter().map(|pick| pick.id))
}

/// Merges every layer that has any adapter, so that none goes on with what is selected.
fn merge_picks<M: LoraTargets + ?Sized>(model: &mut M, picks: &[Pick]) -> Result<()> {
    let mut merged = HashMap::new();
    model.for_each_linear(&mut |path, linear| {
        if let Some(lora) = linear.adapted() {
            merged.insert(path.to_string(), lora.merged(picks)?);
        }
        Ok(())
    })?;
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
