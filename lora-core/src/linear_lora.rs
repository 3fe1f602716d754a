//! A frozen linear layer with its adapters.

mod acting;
mod forward;
mod merge;
mod share;

use std::{collections::HashMap, sync::Arc};

use candle_core::{Tensor, Var};

use crate::{
    AdapterConfig, LoraAdapter, Result,
    op::FrozenLinear,
    selection::Pick,
    switch::{AdapterId, DEFAULT, Entry, Switch},
    trained::Trained,
};

pub(crate) use share::Sharing;

/// A linear layer whose weight `W [out, in]` and bias are frozen, and an adapter that is trained:
/// `ys = xs Wᵀ + b + alpha / rank · D(xs) Aᵀ Bᵀ` (Hu et al. 2021).
///
/// It can have several adapters with names; which of them act in a forward pass, alone, summed or
/// each on its rows, is for all layers of a model to say at once: see
/// [`Selection`](crate::Selection).
///
/// `xs` has any rank from 1 up and any strides; its last dimension is `in`. The adapter's numbers
/// may be of another type than the base's: f32 over a bf16 base by default. Forward and backward
/// are one operation each, which computes no gradient for `W` and `b`.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lora_core::{LinearLoRA, PeftConfig};
///
/// let dev = Device::Cpu;
/// let weight = Tensor::randn(0f32, 1.0, (6, 4), &dev)?;
/// let config = PeftConfig::all_linear().dim(2).alpha(3.0).adapter()?;
/// let layer = LinearLoRA::new("q_proj", weight.clone(), None, &config)?;
///
/// let xs = Tensor::randn(0f32, 1.0, (5, 4), &dev)?;
/// let ys = layer.forward(&xs)?;
/// // B begins at zero, so nothing has changed yet.
/// assert_eq!(ys.to_vec2::<f32>()?, xs.matmul(&weight.t()?)?.to_vec2::<f32>()?);
///
/// let grads = ys.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(layer.lora_b()).unwrap().dims(), [6, 2]);
/// assert!(grads.get(&weight).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LinearLoRA {
    path: Arc<str>,
    base: FrozenLinear,
    /// Shared by the layers of a model, and by their clones.
    switch: Arc<Switch>,
    /// In the order of their ids. A value that others can see has at least one.
    loras: Vec<LoraAdapter>,
    /// In the order of their ids.
    trained: Vec<Trained>,
    enabled: bool,
}

impl LinearLoRA {
    /// A fresh adapter on the layer at `path`: `A` drawn as the configuration says, `B` zero. It
    /// is called `default`, active, and begins in training mode. The path is the name in errors,
    /// and a seed of `A` and of dropout.
    ///
    /// # Errors
    /// If the weight is no matrix or of a type that can't be trained on.
    pub fn new(
        path: &str,
        weight: Tensor,
        bias: Option<Tensor>,
        config: &AdapterConfig,
    ) -> Result<Self> {
        let id = AdapterId::fresh();
        let lora = LoraAdapter::fresh(id, path, &weight, config)?;
        let switch = Switch::new();
        let mut state = switch.write();
        state.insert(id, Entry::new(DEFAULT));
        state.current = state.sum([(DEFAULT, 1.0)])?;
        drop(state);
        let mut layer = Self::bare(path, weight, bias, &switch);
        layer.attach(Some(lora), None);
        Ok(layer)
    }

    /// A layer without an adapter.
    pub(crate) fn bare(
        path: &str,
        weight: Tensor,
        bias: Option<Tensor>,
        switch: &Arc<Switch>,
    ) -> Self {
        Self {
            path: path.into(),
            base: FrozenLinear::new(weight, bias),
            switch: switch.clone(),
            loras: Vec::new(),
            trained: Vec::new(),
            enabled: true,
        }
    }

    /// The path that the layer was adapted under.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The frozen weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        self.base.weight()
    }

    /// The frozen bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.base.bias()
    }

    /// The adapter with this name, if it has one on this layer.
    pub fn adapter(&self, name: &str) -> Option<&LoraAdapter> {
        let id = self.switch.read().pick(name).ok()?.id;
        self.lora(id)
    }

    /// `A` of the first active adapter of this layer, or of the first; the same goes for all that
    /// follows.
    pub fn lora_a(&self) -> &Var {
        self.current().lora_a()
    }

    /// `B`, `[out, rank]`.
    pub fn lora_b(&self) -> &Var {
        self.current().lora_b()
    }

    /// The rank r.
    pub fn rank(&self) -> usize {
        self.current().rank()
    }

    /// Alpha.
    pub fn alpha(&self) -> f64 {
        self.current().alpha()
    }

    /// Whether the scaling is rsLoRA's.
    pub fn is_rslora(&self) -> bool {
        self.current().is_rslora()
    }

    /// What the adapter's output is multiplied by: `alpha / rank`, or with rsLoRA `alpha / √rank`.
    pub fn scaling(&self) -> f64 {
        self.current().scaling()
    }

    /// The probability of dropout.
    pub fn dropout(&self) -> f64 {
        self.current().dropout()
    }

    /// Whether dropout is on.
    pub fn is_training(&self) -> bool {
        self.current().is_training()
    }

    fn current(&self) -> &LoraAdapter {
        let state = self.switch.read();
        let mut picks = state.current.picks();
        let active = picks.find_map(|pick| self.lora(pick.id));
        active.unwrap_or(&self.loras[0])
    }

    /// Turns dropout on or off, for every adapter of the layer.
    pub fn set_training(&mut self, training: bool) {
        self.loras
            .iter_mut()
            .for_each(|lora| lora.set_training(training));
    }

    /// Whether adapters take part in the forward pass of this layer.
    pub fn is_enabled(&self) -> bool {
        self.enabled && !self.switch.read().disabled
    }

    /// Lets the adapters take part in the forward pass of this layer, or not. Where
    /// [`disable_adapters`](crate::LoraTargets::disable_adapters) turned off the whole model, they
    /// don't.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Makes `step` the number of the next dropout mask of every adapter, to repeat or resume a
    /// run.
    pub fn set_dropout_step(&self, step: u64) {
        self.loras
            .iter()
            .for_each(|lora| lora.set_dropout_step(step));
    }

    pub(crate) fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    pub(crate) fn loras(&self) -> &[LoraAdapter] {
        &self.loras
    }

    /// The adapters of these that do anything on this layer, with their weights.
    pub(crate) fn of<'a>(
        &'a self,
        picks: &'a [Pick],
    ) -> impl Iterator<Item = (&'a LoraAdapter, f64)> {
        let found = picks
            .iter()
            .filter_map(|pick| Some((self.lora(pick.id)?, pick.weight)));
        found.filter(|(lora, _)| !lora.is_idle())
    }

    /// The adapter with this id, if it has one on this layer.
    pub(crate) fn lora(&self, id: AdapterId) -> Option<&LoraAdapter> {
        let place = self.loras.binary_search_by_key(&id, LoraAdapter::id);
        place.ok().map(|place| &self.loras[place])
    }

    pub(crate) fn lora_mut(&mut self, id: AdapterId) -> Option<&mut LoraAdapter> {
        let place = self.loras.binary_search_by_key(&id, LoraAdapter::id);
        place.ok().map(|place| &mut self.loras[place])
    }

    /// What the adapter trains of the layer itself.
    pub(crate) fn trained(&self, id: AdapterId) -> Option<&Trained> {
        let place = self.trained.binary_search_by_key(&id, |trained| trained.id);
        place.ok().map(|place| &self.trained[place])
    }

    /// The adapters that train something of the layer itself.
    pub(crate) fn replacing(&self) -> impl Iterator<Item = AdapterId> {
        self.trained.iter().map(|trained| trained.id)
    }

    /// Whether no adapter is left.
    pub(crate) fn is_bare(&self) -> bool {
        self.loras.is_empty() && self.trained.is_empty()
    }

    /// Adds what an adapter has for this layer.
    pub(crate) fn attach(&mut self, lora: Option<LoraAdapter>, trained: Option<Trained>) {
        self.loras.extend(lora);
        self.trained.extend(trained);
        self.sort();
    }

    /// Drops what an adapter has for this layer.
    pub(crate) fn detach(&mut self, id: AdapterId) {
        self.loras.retain(|lora| lora.id() != id);
        self.trained.retain(|trained| trained.id != id);
        // A model has many layers, and once had many adapters perhaps.
        self.loras.shrink_to_fit();
        self.trained.shrink_to_fit();
    }

    /// Makes the layer listen to another switch, on which some adapters have other ids.
    pub(crate) fn join(&mut self, switch: &Arc<Switch>, ids: &HashMap<AdapterId, AdapterId>) {
        let renamed = |id: AdapterId| ids.get(&id).copied().unwrap_or(id);
        self.switch = switch.clone();
        for lora in &mut self.loras {
            lora.set_id(renamed(lora.id()));
        }
        for trained in &mut self.trained {
            trained.id = renamed(trained.id);
        }
        self.sort();
    }

    fn sort(&mut self) {
        self.loras.sort_by_key(LoraAdapter::id);
        self.trained.sort_by_key(|trained| trained.id);
    }
}
