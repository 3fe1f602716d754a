//! Whether a backward pass reached every adapter.

use candle_core::{Var, backprop::GradStore};

use crate::{Error, Result};

/// The body of [`LoraTargets::check_gradients`](crate::LoraTargets::check_gradients).
pub(crate) fn check(vars: &[(String, Var)], grads: &GradStore) -> Result<()> {
    let missing: Vec<String> = vars
        .iter()
        .filter(|(_, var)| grads.get(var).is_none())
        .map(|(name, _)| name.clone())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::NoGradient {
        missing,
        total: vars.len(),
    })
}
