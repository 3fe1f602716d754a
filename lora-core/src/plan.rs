//! What a configuration would make of a model, before anything is done.

mod table;

use std::collections::{BTreeSet, HashSet};

use serde::{Deserialize, Serialize};

use crate::{
    AdapterConfig, LoraTargets, NotAdapted, PeftConfig, Result,
    apply::{check_can_save, check_unapplied, switch_for},
    op::compute_dtype,
    select::{SavedFor, choose, select_saved},
    survey::{Parameter, Site, Survey},
    switch::DEFAULT,
};

/// What [`apply_lora`](LoraTargets::apply_lora) would do to a model: the layers that get an
/// adapter, what else is trained, and what is left alone and why.
///
/// It prints as tables, and serde writes it for programs.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora_core::{LoraTargets, PeftConfig, nn::Linear};
///
/// #[derive(LoraTargets)]
/// struct Attention { q_proj: Linear, k_proj: Linear }
///
/// let layer = || Tensor::zeros((6, 4), DType::BF16, &Device::Cpu).map(|w| Linear::new(w, None));
/// let mut model = Attention { q_proj: layer()?, k_proj: layer()? };
/// let plan = model.lora_plan(&PeftConfig::new(["q_proj"]).dim(2).alpha(3.0))?;
///
/// let q_proj = &plan.adapted[0];
/// assert_eq!((q_proj.scaling, q_proj.parameters), (1.5, 2 * (4 + 6)));
/// assert_eq!(q_proj.bytes, 4 * 2 * (4 + 6)); // an adapter over a bf16 base has f32 numbers
/// assert_eq!(q_proj.saved_bytes_per_token, 2 * 4 + 4 * 2);
/// assert_eq!(plan.not_adapted[0].reason.to_string(), "not targeted");
/// assert_eq!(model.lora_report()?.sites, []);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraPlan {
    /// The linear layers that get an adapter, in declaration order.
    pub adapted: Vec<PlannedAdapter>,
    /// The parameters of the base that are trained whole, in declaration order.
    pub trained: Vec<PlannedTensor>,
    /// The linear layers that get no adapter, in declaration order.
    pub not_adapted: Vec<SkippedLayer>,
    /// The parameters of all layers before; shared ones count once.
    pub base_parameters: usize,
    /// Whether an adapted layer is one operation (`use_fused`). Composed of candle's it keeps more
    /// for the backward pass than the plan says.
    pub fused: bool,
}

/// An adapter in a [`LoraPlan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedAdapter {
    /// The path of the linear layer.
    pub path: String,
    /// The width of its input.
    pub in_features: usize,
    /// The width of its output.
    pub out_features: usize,
    /// The adapter's rank.
    pub rank: usize,
    /// The adapter's alpha.
    pub alpha: f64,
    /// What the adapter's output is multiplied by: `alpha / rank`, or with rsLoRA `alpha / √rank`.
    pub scaling: f64,
    /// The adapter's parameters: `rank · (in + out)`, and with `lora_bias` `out` more.
    pub parameters: usize,
    /// What they take up, in their own type.
    pub bytes: usize,
    /// What the layer keeps of each token for the backward pass: the input, in the base's type,
    /// and its product with `A`, in f32 (f64 over an f64 base). Layers that are given the same
    /// tensor, as the projections of an attention are, keep it once together.
    pub saved_bytes_per_token: usize,
}

/// A parameter of the base that is trained whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedTensor {
    /// The path of its module.
    pub path: String,
    /// Its name in the module: `weight` or `bias`.
    pub name: String,
    /// How many numbers it has.
    pub parameters: usize,
    /// What they take up in the copy that is trained. It is of f32 (f64 over an f64 base) in a
    /// linear layer, and of the base's type elsewhere.
    pub bytes: usize,
    /// What asks for it.
    pub reason: TrainedFor,
}

/// What asks for a parameter of the base to be trained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TrainedFor {
    /// This entry of `modules_to_save`, which names its module or one above.
    ModulesToSave(String),
    /// The setting `bias`.
    Bias,
}

/// A linear layer that gets no adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedLayer {
    /// The path of the layer.
    pub path: String,
    /// Why.
    pub reason: NotAdapted,
}

impl LoraPlan {
    /// The numbers that are trained: of all adapters, and of the base.
    ///
    /// The base's are trained as copies, so that the adapters can be taken off.
    pub fn trainable_parameters(&self) -> usize {
        let adapters = self.adapted.iter().map(|adapter| adapter.parameters);
        let tensors = self.trained.iter().map(|tensor| tensor.parameters);
        sum(adapters.chain(tensors))
    }

    /// The bytes of what is trained.
    pub fn trainable_bytes(&self) -> usize {
        let adapters = self.adapted.iter().map(|adapter| adapter.bytes);
        let tensors = self.trained.iter().map(|tensor| tensor.bytes);
        sum(adapters.chain(tensors))
    }

    /// The share of the trained among all parameters, from 0 to 1.
    pub fn trainable_share(&self) -> f64 {
        let trainable = self.trainable_parameters() as f64;
        trainable / (self.base_parameters as f64 + trainable).max(1.0)
    }

    /// What the adapted layers keep of each token for the backward pass, at most: as if no two
    /// were given the same tensor.
    pub fn saved_bytes_per_token(&self) -> usize {
        let adapters = self.adapted.iter();
        sum(adapters.map(|adapter| adapter.saved_bytes_per_token))
    }
}

/// The body of [`LoraTargets::lora_plan`]. It checks what [`apply`](crate::apply) does, in its
/// order.
pub(crate) fn plan<M: LoraTargets>(model: &mut M, config: &PeftConfig) -> Result<LoraPlan> {
    check_unapplied(model)?;
    config.validate()?;
    let survey = Survey::of(model)?;
    let switch = switch_for(model, DEFAULT)?;
    let choices = choose::<M>(config, &survey.sites)?;
    let chosen: Vec<_> = choices.iter().map(|choice| choice.clone().ok()).collect();
    let saved = select_saved::<M>(config, &chosen, &survey)?;
    let (mut adapted, mut not_adapted) = (Vec::new(), Vec::new());
    for (site, choice) in survey.sites.iter().zip(choices) {
        match choice {
            Ok(adapter) => adapted.push(PlannedAdapter::of(site, &adapter)?),
            Err(reason) => not_adapted.push(SkippedLayer {
                path: site.path.clone(),
                reason,
            }),
        }
    }
    let linear: HashSet<&str> = survey.sites.iter().map(|site| site.path.as_str()).collect();
    let (mut trained, mut others) = (Vec::new(), BTreeSet::new());
    for saved in saved {
        let parameter = &survey.tensors[saved.index];
        let is_linear = linear.contains(parameter.path.as_str());
        if !is_linear {
            others.insert(format!("{}.{}", parameter.path, parameter.name));
        }
        trained.push(PlannedTensor::of(parameter, is_linear, saved.reason));
    }
    if let Some(key) = others.first() {
        check_can_save(&switch, DEFAULT, key)?;
    }
    Ok(LoraPlan {
        adapted,
        trained,
        not_adapted,
        base_parameters: survey.parameters,
        fused: config.fields.use_fused,
    })
}

impl PlannedAdapter {
    fn of(site: &Site, adapter: &AdapterConfig) -> Result<Self> {
        let shape = adapter.fit(&site.path, &site.weight)?;
        let base = site.weight.dtype();
        let hidden = compute_dtype(base)
            .size_in_bytes()
            .saturating_mul(adapter.dim + usize::from(adapter.lora_bias)); // and a column of ones
        let input = base.size_in_bytes().saturating_mul(shape.inputs);
        Ok(Self {
            path: site.path.clone(),
            in_features: shape.inputs,
            out_features: shape.outputs,
            rank: adapter.dim,
            alpha: adapter.alpha,
            scaling: adapter.scaling(),
            parameters: shape.parameters,
            bytes: shape.parameters.saturating_mul(shape.dtype.size_in_bytes()),
            saved_bytes_per_token: input.saturating_add(hidden),
        })
    }

    /// Whether the rank exceeds what the layer can use: a product of `[out, in]` has rank
    /// `min(in, out)` at most.
    pub fn is_rank_wasted(&self) -> bool {
        self.rank > self.in_features.min(self.out_features)
    }
}

impl PlannedTensor {
    fn of(parameter: &Parameter, is_linear: bool, reason: SavedFor) -> Self {
        let parameters = parameter.tensor.elem_count();
        let dtype = match is_linear {
            true => compute_dtype(parameter.tensor.dtype()),
            false => parameter.tensor.dtype(),
        };
        Self {
            path: parameter.path.clone(),
            name: parameter.name.clone(),
            parameters,
            bytes: parameters.saturating_mul(dtype.size_in_bytes()),
            reason: match reason {
                SavedFor::Module(entry) => TrainedFor::ModulesToSave(entry),
                SavedFor::Bias => TrainedFor::Bias,
            },
        }
    }
}

fn sum(values: impl Iterator<Item = usize>) -> usize {
    values.fold(0, usize::saturating_add)
}
