//! Which adapters there are, and which act.

use std::sync::Arc;

use crate::{
    Adapters, Error, LoraTargets, Result,
    join::switch_of,
    saved::{place, settle},
    selection::Choice,
    switch::Switch,
};

/// The switch of a model that has an adapter.
pub(super) fn switch<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Arc<Switch>> {
    switch_of(model)?.ok_or(Error::NoAdapter)
}

/// The body of [`LoraTargets::adapters`].
pub(crate) fn adapters<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Adapters> {
    switch(model).map(Adapters::new)
}

/// The body of [`LoraTargets::set_adapters`].
pub(crate) fn set<M: LoraTargets + ?Sized>(model: &mut M, names: &[impl AsRef<str>]) -> Result<()> {
    let switch = switch(model)?;
    switch.unmerged()?;
    let names = names.iter().map(|name| (name.as_ref(), 1.0));
    let choice = switch.read().sum(names)?;
    switch.write().current = choice;
    settle(model, &switch)
}

/// The body of [`LoraTargets::enable_adapters`] and [`LoraTargets::disable_adapters`].
pub(crate) fn set_disabled<M: LoraTargets + ?Sized>(model: &mut M, disabled: bool) -> Result<()> {
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    switch.write().disabled = disabled;
    if !disabled {
        model.for_each_linear(&mut |_, linear| {
            if let Some(lora) = linear.adapted_mut() {
                lora.set_enabled(true);
            }
            Ok(())
        })?;
    }
    settle(model, &switch)
}

/// The body of [`LoraTargets::rename_adapter`].
pub(crate) fn rename<M: LoraTargets + ?Sized>(model: &mut M, from: &str, to: &str) -> Result<()> {
    let switch = switch(model)?;
    let mut state = switch.write();
    let pick = state.pick(from)?;
    if from != to {
        state.check_new(to)?;
        state.rename(pick.id, to);
    }
    Ok(())
}

/// The body of [`LoraTargets::delete_adapter`].
pub(crate) fn delete<M: LoraTargets + ?Sized>(model: &mut M, name: &str) -> Result<()> {
    let switch = switch(model)?;
    switch.unmerged()?;
    let state = switch.read();
    let id = state.pick(name)?.id;
    if matches!(&state.current, Choice::Rows(_)) && state.current.contains(id) {
        let reason = "acts on rows of the selected batch; select others first";
        return Err(Error::adapter(name, reason));
    }
    if state.adapters().count() == 1 {
        drop(state);
        return remove_all(model);
    }
    let owner = state.saved.as_ref().map(|saved| saved.owner);
    drop(state);
    if owner == Some(id) {
        place(model, &switch, false)?;
        switch.write().saved = None;
    }
    model.for_each_linear(&mut |_, linear| {
        linear.detach(id);
        Ok(())
    })?;
    switch.write().remove(id);
    settle(model, &switch)
}

/// The body of [`LoraTargets::remove_adapters`].
pub(crate) fn remove_all<M: LoraTargets + ?Sized>(model: &mut M) -> Result<()> {
    let Some(switch) = switch_of(model)? else {
        return Ok(());
    };
    place(model, &switch, false)?;
    model.for_each_linear(&mut |_, linear| {
        linear.remove_adapter();
        Ok(())
    })?;
    switch.close();
    Ok(())
}
