//! What there is of adapters in a model.

use std::collections::BTreeMap;

use super::roster::switch;
use crate::{
    LoraReport, LoraSite, LoraTargets, Result,
    join::switch_of,
    saved::merged_picks,
    selection::Pick,
    survey::Survey,
    switch::{AdapterId, Entry},
};

/// An adapter of a model: a line of [`LoraTargets::adapter_status`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterStatus {
    /// Its name.
    pub name: String,
    /// Whether it is selected wherever no scope says otherwise.
    pub active: bool,
    /// Whether it is in the weights.
    pub merged: bool,
    /// How many linear layers it adapts.
    pub sites: usize,
    /// How many numbers it trains, those of copies of the base's included.
    pub parameters: usize,
}

/// The body of [`LoraTargets::adapter_status`].
pub(crate) fn status<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Vec<AdapterStatus>> {
    let Some(switch) = switch_of(model)? else {
        return Ok(Vec::new());
    };
    let merged = merged_picks(model)?.unwrap_or_default();
    let mut sizes = BTreeMap::<AdapterId, (usize, usize)>::new();
    model.for_each_linear(&mut |path, linear| {
        let Some(lora) = linear.adapted() else {
            return Ok(());
        };
        for adapter in lora.loras().iter().filter(|adapter| !adapter.is_idle()) {
            let size = sizes.entry(adapter.id()).or_default();
            size.0 += 1;
            size.1 += LoraSite::of(path.as_str(), adapter).parameters();
        }
        for id in lora.replacing() {
            let vars = lora
                .trained(id)
                .into_iter()
                .flat_map(|trained| trained.vars());
            sizes.entry(id).or_default().1 += vars.map(|(_, var)| var.elem_count()).sum::<usize>();
        }
        Ok(())
    })?;
    let state = switch.read();
    if let Some(saved) = &state.saved {
        let vars = saved.parameters.values();
        let count = vars
            .map(|parameter| parameter.trained.elem_count())
            .sum::<usize>();
        sizes.entry(saved.owner).or_default().1 += count;
    }
    let line = |(id, entry): (AdapterId, &Entry)| {
        let (sites, parameters) = sizes.get(&id).copied().unwrap_or_default();
        AdapterStatus {
            name: entry.name.to_string(),
            active: state.current.contains(id),
            merged: merged.iter().any(|pick| pick.id == id),
            sites,
            parameters,
        }
    };
    Ok(state.adapters().map(line).collect())
}

/// The body of [`LoraTargets::lora_report`].
pub(crate) fn report<M: LoraTargets + ?Sized>(model: &mut M) -> Result<LoraReport> {
    let picks = match switch_of(model)? {
        Some(switch) => switch.read().current.picks().cloned().collect(),
        None => Vec::new(),
    };
    of(model, &picks)
}

/// The report on one adapter.
pub(crate) fn report_of<M: LoraTargets + ?Sized>(model: &mut M, name: &str) -> Result<LoraReport> {
    let pick = switch(model)?.read().pick(name)?;
    of(model, &[pick])
}

fn of<M: LoraTargets + ?Sized>(model: &mut M, picks: &[Pick]) -> Result<LoraReport> {
    let mut sites = Vec::new();
    model.for_each_linear(&mut |path, linear| {
        if let Some(lora) = linear.adapted() {
            let adapters = picks.iter().filter_map(|pick| lora.lora(pick.id));
            let adapters = adapters.filter(|adapter| !adapter.is_idle());
            sites.extend(adapters.map(|adapter| LoraSite::of(path.as_str(), adapter)));
        }
        Ok(())
    })?;
    let adapters = sites.iter().map(LoraSite::parameters).sum::<usize>();
    let picked = |line: &AdapterStatus| picks.iter().any(|pick| *pick.name == line.name);
    let lines = status(model)?.into_iter().filter(picked);
    Ok(LoraReport {
        sites,
        base_parameters: Survey::of(model)?.parameters,
        saved_parameters: lines.map(|line| line.parameters).sum::<usize>() - adapters,
        notes: Vec::new(),
    })
}
