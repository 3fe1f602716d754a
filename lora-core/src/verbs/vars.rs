//! The tensors to train.

use candle_core::Var;

use super::roster::switch;
use crate::{LinearLoRA, LoraTargets, Result, join::switch_of, selection::Pick};

/// The tensors that an adapter trains, with their names.
pub(crate) fn vars<M: LoraTargets + ?Sized>(
    model: &mut M,
    name: &str,
) -> Result<Vec<(String, Var)>> {
    let pick = switch(model)?.read().pick(name)?;
    of(model, &[pick])
}

/// The body of [`LoraTargets::named_lora_vars`].
pub(crate) fn active_vars<M: LoraTargets + ?Sized>(model: &mut M) -> Result<Vec<(String, Var)>> {
    let Some(switch) = switch_of(model)? else {
        return Ok(Vec::new());
    };
    let picks: Vec<Pick> = switch.read().current.picks().cloned().collect();
    of(model, &picks)
}

/// In the model's order; names have that of the adapter in them if there are several.
fn of<M: LoraTargets + ?Sized>(model: &mut M, picks: &[Pick]) -> Result<Vec<(String, Var)>> {
    let infix = |pick: &Pick| match picks {
        [_] => String::new(),
        _ => format!(".{}", pick.name),
    };
    let mut vars = Vec::new();
    model.for_each_linear(&mut |path, linear| {
        if let Some(lora) = linear.adapted() {
            for pick in picks {
                of_layer(path.as_str(), lora, pick, &infix(pick), &mut vars);
            }
        }
        Ok(())
    })?;
    if let Some(switch) = switch_of(model)?
        && let Some(saved) = &switch.read().saved
        && let Some(pick) = picks.iter().find(|pick| pick.id == saved.owner)
    {
        for (key, parameter) in &saved.parameters {
            vars.push((format!("{key}{}", infix(pick)), parameter.trained.clone()));
        }
    }
    Ok(vars)
}

fn of_layer(
    path: &str,
    lora: &LinearLoRA,
    pick: &Pick,
    infix: &str,
    vars: &mut Vec<(String, Var)>,
) {
    if let Some(adapter) = lora.lora(pick.id).filter(|adapter| !adapter.is_idle()) {
        let named = adapter.vars(infix).into_iter();
        vars.extend(named.map(|(name, var)| (format!("{path}.{name}"), var)));
    }
    if let Some(trained) = lora.trained(pick.id) {
        let named = trained.vars();
        vars.extend(named.map(|(name, var)| (format!("{path}.{name}{infix}"), var.clone())));
    }
}
