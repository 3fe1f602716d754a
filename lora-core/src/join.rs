//! One switch for a model whose parts were adapted apart.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    Error, LoraTargets, Result,
    selection::{Choice, Pick},
    switch::{Entry, Switch},
};

/// The switch of a model; `None` if it has no adapter.
///
/// Parts that were adapted apart have one each. They get one in common: what has the same name is
/// then one adapter, and all that was active is.
pub(crate) fn switch_of<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Option<Arc<Switch>>> {
    let mut switches = Vec::<Arc<Switch>>::new();
    model.for_each_linear(&mut |_, linear| {
        if let Some(lora) = linear.adapted()
            && !switches
                .iter()
                .any(|known| Arc::ptr_eq(known, lora.switch()))
        {
            switches.push(lora.switch().clone());
        }
        Ok(())
    })?;
    if switches.len() < 2 {
        return Ok(switches.pop());
    }

    let joined = Switch::new();
    let (mut ids, mut active, mut disabled) = (HashMap::new(), Vec::<Pick>::new(), true);
    let mut state = joined.write();
    for switch in &switches {
        let old = switch.read();
        if let Some(saved) = &old.saved {
            let reason = format!(
                "trains `{}` of a part of the model that was adapted apart; adapt the whole model",
                saved.first_key()
            );
            return Err(Error::adapter(old.name(saved.owner), reason));
        }
        for (id, entry) in old.adapters() {
            match state.pick(&entry.name) {
                Ok(same) => drop(ids.insert(id, same.id)),
                Err(_) => state.insert(
                    id,
                    Entry {
                        replaces: BTreeSet::new(),
                        ..entry.clone()
                    },
                ),
            }
        }
        let Choice::Sum(picks) = &old.current else {
            return Err(Error::MixedBatch);
        };
        for pick in picks.iter() {
            let pick = Pick {
                weight: pick.weight,
                ..state.pick(&pick.name)?
            };
            if active.iter().all(|other| other.id != pick.id) {
                active.push(pick);
            }
        }
        disabled &= old.disabled;
    }
    state.current = Choice::Sum(active.into());
    state.disabled = disabled;

    model.for_each_linear(&mut |path, linear| {
        linear.join(&joined, &ids);
        if let Some(lora) = linear.adapted() {
            lora.replacing().for_each(|id| state.add_replaced(id, path));
        }
        Ok(())
    })?;
    drop(state);
    switches.iter().for_each(|switch| switch.close());
    Ok(Some(joined))
}
