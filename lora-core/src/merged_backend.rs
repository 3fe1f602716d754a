//! Adapters for models of others: weights with adapters merged in, under the names that a model
//! asks a `VarBuilder` for.

mod base;
mod change;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use base::Base;
use candle_core::{DType, Device, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use change::{Change, fits};

use crate::{
    Error, Result,
    adapter::{AdapterWeights, Sample},
};

/// Adapters to be merged into the weights of a model that knows nothing of adapters: one of
/// `candle_transformers`, unmodified, whose fields are private.
///
/// Wrap the `VarBuilder` that the model is built from. Where an adapter has a layer, the model gets
/// `W + weight · scaling · B A`, and `b + weight · scaling · c` if the adapter has a bias `c`;
/// where it has a whole tensor (`modules_to_save`, a trained bias), that one in place of the
/// model's. Several adapters are added up. All is computed in f32 (f64 for an f64 model) from the
/// weight as the file has it and rounded once, to the type that the model asks for.
///
/// ```
/// use std::collections::{BTreeMap, HashMap};
///
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::VarBuilder;
/// use lora_core::{MergedAdapters, adapter::{AdapterWeights, LayerWeights}};
///
/// let dev = Device::Cpu;
/// let layer = LayerWeights {
///     a: Tensor::new(&[[1f32, 0.]], &dev)?,
///     b: Tensor::new(&[[0f32], [1.], [0.]], &dev)?,
///     bias: None,
///     alpha: 4.0,
///     rslora: false,
/// };
/// let adapter = AdapterWeights {
///     layers: BTreeMap::from([("up_proj".to_string(), layer)]),
///     ..AdapterWeights::default()
/// };
/// let base = HashMap::from([("up_proj.weight".to_string(), Tensor::zeros((3, 2), DType::F32, &dev)?)]);
/// let vb = VarBuilder::from_tensors(base, DType::F32, &dev);
///
/// let merged = MergedAdapters::new([(adapter, 0.5)])?;
/// let layer = candle_nn::linear_no_bias(2, 3, merged.var_builder(vb).pp("up_proj"))?; // any model
/// merged.finish()?; // all of the adapter is in it
/// assert_eq!(layer.weight().to_vec2::<f32>()?, [[0., 0.], [2., 0.], [0., 0.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MergedAdapters {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// By the names that models give their tensors.
    changes: BTreeMap<String, Change>,
    /// Every name that was asked for, and whether a changed tensor was given.
    asked: Mutex<BTreeMap<String, bool>>,
    bases: Vec<Base>,
    /// Of the weights that were merged into, by the model's names.
    samples: Mutex<BTreeMap<String, Sample>>,
}

impl MergedAdapters {
    /// The sum of `adapters`, each multiplied by its weight (1 for an adapter as it is).
    ///
    /// # Errors
    /// If two adapters replace one tensor, if one that replaces a tensor has a weight other than 1,
    /// which a replacement cannot have, or if a weight is not finite.
    pub fn new(adapters: impl IntoIterator<Item = (AdapterWeights, f64)>) -> Result<Self> {
        let adapters: Vec<_> = adapters.into_iter().collect();
        let bases = adapters.iter().filter_map(|(adapter, _)| Base::of(adapter));
        let bases = bases.collect();
        Ok(Self::of(change::collect(adapters)?, bases))
    }

    fn of(changes: BTreeMap<String, Change>, bases: Vec<Base>) -> Self {
        Self {
            shared: Arc::new(Shared {
                changes,
                asked: Mutex::default(),
                bases,
                samples: Mutex::default(),
            }),
        }
    }

    /// The same adapters with `to` in place of `from` where a path begins with `from`: for an
    /// adapter that was trained on a model whose names begin otherwise.
    ///
    /// Either may be empty: `replace_prefix("bert", "")` makes `encoder.layer.0` of
    /// `bert.encoder.layer.0`, `replace_prefix("", "model")` makes `model.layers.0` of `layers.0`.
    ///
    /// # Errors
    /// If two of the adapters' tensors would then have one name.
    pub fn replace_prefix(&self, from: &str, to: &str) -> Result<Self> {
        let rename = |name: &str| {
            let rest = match from {
                "" => Some(name),
                _ => name
                    .strip_prefix(from)
                    .and_then(|rest| rest.strip_prefix('.')),
            };
            match (rest, to) {
                (None, _) => name.to_string(),
                (Some(rest), "") => rest.to_string(),
                (Some(rest), _) => format!("{to}.{rest}"),
            }
        };
        let mut changes = BTreeMap::new();
        for (name, change) in &self.shared.changes {
            let renamed = rename(name);
            if changes.insert(renamed.clone(), change.clone()).is_some() {
                let reason = format!(
                    "two tensors of the adapters have this name with `{to}` in place of `{from}`"
                );
                return Err(Error::module(renamed, reason));
            }
        }
        let bases = self.shared.bases.iter().map(|base| base.renamed(rename));
        Ok(Self::of(changes, bases.collect()))
    }

    /// The tensors of `vb`, with the adapters in them.
    ///
    /// Their names are whole: the prefix of `vb` counts, so `merged.var_builder(vb.pp("bert"))`
    /// gives a model the tensors below `bert` and looks for them in the adapters as `bert.*`.
    /// What the `VarBuilder` cannot give is an error when the model asks for it; what the model did
    /// not ask for, [`finish`](Self::finish) tells.
    pub fn var_builder<'a>(&self, vb: VarBuilder<'a>) -> VarBuilder<'a> {
        let (dtype, device, prefix) = (vb.dtype(), vb.device().clone(), vb.prefix());
        let backend = Backend {
            shared: self.shared.clone(),
            base: vb.root(),
        };
        let vb = VarBuilder::from_backend(Box::new(backend), dtype, device);
        if prefix.is_empty() { vb } else { vb.pp(prefix) }
    }

    /// Whether a base model's tensor `name` changes: [`merge`](Self::merge) need only be asked then.
    ///
    /// # Errors
    /// If the adapters have apart what the base model keeps fused in this tensor.
    pub fn changes(&self, name: &str) -> Result<bool> {
        // Asked for, but not given.
        self.shared.asked().entry(name.to_string()).or_default();
        let changes = self.shared.changes.contains_key(name);
        if !changes {
            self.shared.refuse_fused(name)?;
        }
        Ok(changes)
    }

    /// The tensor that takes the place of a base model's tensor `name`, of its shape and type;
    /// `None` if no adapter changes it. This is what [`var_builder`](Self::var_builder) gives to a
    /// model that asks for it, for those who hold tensors and not a model.
    ///
    /// # Errors
    /// If the adapter's tensors don't fit, or the result is not finite.
    pub fn merge(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let tensor = self.shared.give(name, |change| {
            let own = |_| self.shared.seen(name, base.clone(), base.dtype());
            let tensor = change.apply(name, base.dtype(), base.device(), own)?;
            fits(name, base.shape(), tensor.shape())?;
            Ok(tensor)
        });
        Ok(tensor?)
    }

    /// The names of the model's tensors that the adapters change, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shared.changes.keys().map(String::as_str)
    }

    /// The names of the tensors that the adapters change and nobody asked for: what
    /// [`finish`](Self::finish) refuses, for a model that is meant to do without, such as a BERT
    /// without its pooler.
    pub fn unused(&self) -> Vec<String> {
        let asked = self.shared.asked();
        let unused = self.names().filter(|name| asked.get(*name) != Some(&true));
        unused.map(str::to_string).collect()
    }

    /// Checks that everything in the adapters was asked for, and so merged, and that the model is the
    /// one that they were trained on, if they tell. Call it when the model is built.
    ///
    /// # Errors
    /// An [`Error::Unmerged`] that names every tensor that nobody asked for; an [`Error::Adapter`]
    /// for an adapter of another base.
    pub fn finish(&self) -> Result<()> {
        let (unused, asked) = (self.unused(), self.shared.asked());
        if unused.is_empty() {
            let samples = self.shared.samples();
            return self
                .shared
                .bases
                .iter()
                .try_for_each(|base| base.check(&samples));
        }
        let problems = unused
            .iter()
            .map(|name| self.shared.why_unused(name, &asked));
        Err(Error::Unmerged {
            problems: problems.collect(),
        })
    }
}

impl Shared {
    fn asked(&self) -> MutexGuard<'_, BTreeMap<String, bool>> {
        // A map of names is whole at any time.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn samples(&self) -> MutexGuard<'_, BTreeMap<String, Sample>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the base's tensor `name`, which is of `dtype` in the model, for the check of the base.
    fn seen(&self, name: &str, tensor: Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        // What f16 made of a base can't be told from another base.
        if dtype != DType::F16 && self.bases.iter().any(|base| base.has(name)) {
            self.samples()
                .insert(name.to_string(), Sample::of(&tensor)?);
        }
        Ok(tensor)
    }

    /// The tensor `name` as `tensor` makes it of its change; `None` if it has none. Notes whether
    /// that went well: a model may ask in vain, and then by another name.
    fn give(
        &self,
        name: &str,
        tensor: impl FnOnce(&Change) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Option<Tensor>> {
        let tensor = self.changes.get(name).map(tensor).transpose();
        let given = matches!(tensor, Ok(Some(_)));
        *self.asked().entry(name.to_string()).or_default() |= given;
        if !self.changes.contains_key(name) {
            self.refuse_fused(name)?;
        }
        tensor
    }

    /// Some models keep projections fused that adapters know apart.
    fn refuse_fused(&self, name: &str) -> candle_core::Result<()> {
        const FUSED: [(&str, &[&str]); 4] = [
            ("qkv_proj.weight", &["q_proj", "k_proj", "v_proj"]),
            ("Wqkv.weight", &["q_proj", "k_proj", "v_proj"]),
            ("query_key_value.weight", &["q_proj", "k_proj", "v_proj"]),
            ("gate_up_proj.weight", &["gate_proj", "up_proj"]),
        ];
        for (fused, parts) in FUSED {
            let Some(path) = name.strip_suffix(fused) else {
                continue;
            };
            let of_adapter = parts
                .iter()
                .map(|part| format!("{path}{part}"))
                .filter(|path| self.changes.contains_key(&format!("{path}.weight")))
                .collect::<Vec<_>>();
            if !of_adapter.is_empty() {
                bail!(
                    "`{name}`: the model keeps in one weight what the adapter has apart, {}; \
                     use a model that has them apart too",
                    of_adapter.join(", ")
                )
            }
        }
        Ok(())
    }

    /// Why nobody asked for `name`, as far as can be told, and the way out.
    fn why_unused(&self, name: &str, asked: &BTreeMap<String, bool>) -> String {
        let below = |long: &str, short: &str| {
            let prefix = long.strip_suffix(short)?.strip_suffix('.')?;
            Some(prefix.to_string())
        };
        let hint = if let Some(path) = name.strip_suffix(".bias")
            && asked.contains_key(&format!("{path}.weight"))
        {
            "the layer has no bias in this model that could take it".to_string()
        } else if let Some(prefix) = asked.keys().find_map(|asked| below(asked, name)) {
            format!("the model calls it `{prefix}.{name}`; replace the prefix \"\" by \"{prefix}\"")
        } else if let Some((prefix, asked)) = asked
            .keys()
            .find_map(|asked| Some((below(name, asked)?, asked)))
        {
            format!("the model calls it `{asked}`; replace the prefix \"{prefix}\" by \"\"")
        } else {
            "the model has no such tensor".to_string()
        };
        format!("`{name}`: {hint}")
    }
}

/// The `VarBuilder`'s side: the tensors of `base` with the changes in them.
struct Backend<'a> {
    shared: Arc<Shared>,
    base: VarBuilder<'a>,
}

impl SimpleBackend for Backend<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let base = |dtype| {
            self.base
                .get_with_hints_dtype(shape.clone(), name, init, dtype)
        };
        let tensor = self.shared.give(name, |change| {
            let own = |wide| self.shared.seen(name, base(wide)?, dtype);
            let tensor = change.apply(name, dtype, device, own)?;
            fits(name, &shape, tensor.shape())?;
            Ok(tensor)
        });
        match tensor? {
            Some(tensor) => Ok(tensor),
            None => base(dtype)?.to_device(device),
        }
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let base = |dtype| self.base.get_unchecked_dtype(name, dtype);
        let tensor = self.shared.give(name, |change| {
            let own = |wide| self.shared.seen(name, base(wide)?, dtype);
            change.apply(name, dtype, device, own)
        });
        match tensor? {
            Some(tensor) => Ok(tensor),
            None => base(dtype)?.to_device(device),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let change = self.shared.changes.get(name);
        self.base.contains_tensor(name) || change.is_some_and(|change| change.replacement.is_some())
    }
}
