//! The handle on a model's adapters.

use std::sync::Arc;

use crate::{
    Error, Result, Selection,
    selection::{Choice, Pick},
    switch::Switch,
};

/// A handle on the adapters of a model: their names, and what is selected of them.
///
/// It holds no reference to the model and can be cloned and sent to other threads. It switches the
/// model by one store, whatever the number of layers. See [`Selection`] for an example.
#[derive(Clone, Debug)]
pub struct Adapters {
    switch: Arc<Switch>,
}

impl Adapters {
    pub(crate) fn new(switch: Arc<Switch>) -> Self {
        Self { switch }
    }

    /// The names of the adapters, in the order in which they were added.
    pub fn names(&self) -> Vec<String> {
        let state = self.switch.read();
        let names = state.adapters().map(|(_, entry)| entry.name.to_string());
        names.collect()
    }

    /// The names of the active adapters, in the order of the selection. Disabled ones count.
    pub fn active(&self) -> Vec<String> {
        let state = self.switch.read();
        let names = state.current.picks().map(|pick| pick.name.to_string());
        names.collect()
    }

    /// The sum of the adapters with these names; of none, the base model.
    ///
    /// # Errors
    /// If a name is unknown or given twice, or two of the adapters replace the same parameters.
    pub fn select(&self, names: &[impl AsRef<str>]) -> Result<Selection> {
        self.sum(names.iter().map(|name| (name.as_ref(), 1.0)))
    }

    /// The sum of the adapters with these names, each times a weight: PEFT's `set_scale`, but for
    /// one selection.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use lora_core::{LoraTargets, PeftConfig, nn::Linear};
    ///
    /// let dev = Device::Cpu;
    /// let mut layer = Linear::new(Tensor::zeros((1, 1), DType::F32, &dev)?, None);
    /// layer.apply_lora(&PeftConfig::all_linear().dim(1).alpha(1.0))?;
    /// for var in layer.lora_vars()? {
    ///     var.set(&var.ones_like()?)?;
    /// }
    /// let half = layer.adapters()?.weighted(&[("default", 0.5)])?;
    /// let ys = half.scope(|| layer.forward(&Tensor::ones((1, 1), DType::F32, &dev)?))?;
    /// assert_eq!(ys.to_vec2::<f32>()?, [[0.5]]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As of [`select`](Self::select); if a weight is not finite; if it is not 1 for an adapter
    /// that replaces parameters.
    pub fn weighted(&self, parts: &[(impl AsRef<str>, f64)]) -> Result<Selection> {
        self.sum(parts.iter().map(|(name, weight)| (name.as_ref(), *weight)))
    }

    fn sum<'a>(&self, parts: impl IntoIterator<Item = (&'a str, f64)>) -> Result<Selection> {
        let choice = self.switch.read().sum(parts)?;
        Ok(Selection::new(&self.switch, choice))
    }

    /// One adapter for each row of a batch, or `None` for the base model.
    ///
    /// # Errors
    /// If there is no row, or a name is unknown.
    pub fn rows(&self, names: &[Option<impl AsRef<str>>]) -> Result<Selection> {
        if names.is_empty() {
            return Err(Error::NoRows);
        }
        let state = self.switch.read();
        let picks = names
            .iter()
            .map(|name| {
                name.as_ref()
                    .map(|name| state.pick(name.as_ref()))
                    .transpose()
            })
            .collect::<Result<Vec<Option<Pick>>>>()?;
        Ok(Selection::new(&self.switch, Choice::rows(&picks)))
    }

    /// Makes a selection what acts wherever no scope says otherwise. A forward pass that is running
    /// on another thread takes it up at its next layer; one in a [`scope`](Selection::scope) does
    /// not.
    ///
    /// # Errors
    /// If the model is merged; if the selection is of another model, or has an adapter that was
    /// deleted since; if it switches an adapter that trains parameters outside of linear layers,
    /// for which there is [`set_adapter`](crate::LoraTargets::set_adapter).
    pub fn set(&self, selection: &Selection) -> Result<()> {
        match selection.choice_for(&self.switch) {
            Some(choice) => self.switch.set(choice.clone()),
            None => {
                let names = selection.names().join("`, `");
                let reason = "is of another model; select it by this model's `adapters()`";
                Err(Error::adapter(names, reason))
            }
        }
    }
}
