//! Adapters from folders and into them.

use std::path::Path;

use crate::{
    Adapters, Error, LoraReport, LoraTargets, Result,
    adapter::{AdapterWeights, Profile},
    join::switch_of,
    select::type_name,
    switch::DEFAULT,
    verbs,
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
    let weights = AdapterWeights::read(dir)?;
    if let Some(switch) = switch_of(model)?
        && switch.read().pick(DEFAULT).is_ok()
    {
        verbs::replace(model, DEFAULT, &weights).map_err(|error| in_folder(dir, error))?;
        return Ok(LoraReport {
            notes: weights.notes,
            ..verbs::report_of(model, DEFAULT)?
        });
    }
    let report = verbs::import(model, DEFAULT, &weights).map_err(|error| in_folder(dir, error))?;
    model.set_adapter(DEFAULT)?;
    Ok(report)
}

/// The body of [`LoraTargets::load_adapter_as`].
pub(crate) fn load_as<M: LoraTargets>(model: &mut M, name: &str, dir: &Path) -> Result<LoraReport> {
    let weights = AdapterWeights::read(dir)?;
    verbs::import(model, name, &weights).map_err(|error| in_folder(dir, error))
}

/// The error of an adapter that does not fit the model, with the folder that it is from.
fn in_folder(dir: &Path, error: Error) -> Error {
    match error {
        Error::NamedAdapter { reason, .. } => Error::file(dir, reason),
        other => other,
    }
}
