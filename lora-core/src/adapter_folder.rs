//! Adapters from folders and into them.

use std::path::{Path, PathBuf};

use crate::{
    Adapters, Error, LoraReport, LoraTargets, Result,
    adapter::{AdapterWeights, Profile, Reading},
    join::switch_of,
    select::type_name,
    switch::DEFAULT,
    verbs::{self, Found},
};

/// The body of [`LoraTargets::save_adapter`].
pub(crate) fn save<M: LoraTargets>(model: &mut M, dir: &Path) -> Result<()> {
    let names = match switch_of(model)? {
        Some(switch) => Adapters::new(switch).names(),
        None => Vec::new(),
    };
    let name = match &names[..] {
        [] => {
            let reason = format!("`{}` has no adapter to save", type_name::<M>());
            return Err(Error::file(dir, reason));
        }
        [only] => only,
        names if names.iter().any(|name| name == DEFAULT) => DEFAULT,
        names => {
            let names = names.join("`, `");
            let reason = format!("which of `{names}` to save? Name it with `save_adapter_as`");
            return Err(Error::file(dir, reason));
        }
    };
    save_as(model, name, dir)
}

/// The body of [`LoraTargets::save_adapter_as`].
pub(crate) fn save_as<M: LoraTargets + ?Sized>(
    model: &mut M,
    name: &str,
    dir: &Path,
) -> Result<()> {
    verbs::export(model, name)?.write(dir, Profile::Peft)
}

/// The body of [`LoraTargets::load_adapter`].
pub(crate) fn load<M: LoraTargets>(model: &mut M, dir: &Path) -> Result<LoraReport> {
    let Some(switch) = switch_of(model)? else {
        return load_and_set(model, dir);
    };
    if switch.read().pick(DEFAULT).is_err() {
        return load_and_set(model, dir);
    }
    let (weights, found, file) = read(dir)?;
    verbs::replace(model, DEFAULT, &weights, found)?
        .map_err(|problems| Error::Checkpoint { file, problems })?;
    Ok(LoraReport {
        notes: weights.notes,
        ..verbs::report_of(model, DEFAULT)?
    })
}

fn load_and_set<M: LoraTargets>(model: &mut M, dir: &Path) -> Result<LoraReport> {
    let report = load_as(model, DEFAULT, dir)?;
    model.set_adapter(DEFAULT)?;
    Ok(report)
}

/// The body of [`LoraTargets::load_adapter_as`].
pub(crate) fn load_as<M: LoraTargets>(model: &mut M, name: &str, dir: &Path) -> Result<LoraReport> {
    let (weights, found, file) = read(dir)?;
    verbs::add(model, name, &weights, found)?
        .map_err(|problems| Error::Checkpoint { file, problems })
}

/// What a folder holds, what is wrong with it, and the file that is to be named for it.
fn read(dir: &Path) -> Result<(AdapterWeights, Found, PathBuf)> {
    let Reading {
        weights,
        incomplete,
        base,
        problems,
        file,
    } = Reading::of(dir)?;
    let found = Found {
        problems,
        incomplete,
        base,
    };
    Ok((weights, found, file))
}
