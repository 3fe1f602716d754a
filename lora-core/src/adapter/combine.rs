//! One adapter made of several.

use std::{collections::BTreeMap, fmt, str::FromStr};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    AdapterWeights, LayerWeights,
    product::{Product, Truncated},
    sparse::{self, Election},
};
use crate::{
    BiasMode, Error, Result,
    philox::{halves, path_hash},
};

/// How the deltas of several adapters become one.
///
/// All act on the deltas with their scalings, each counted once; PEFT's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The weighted sum, exactly, in as few ranks as it needs.
    #[default]
    Linear,
    /// The weighted sum, exactly, by putting the factors side by side: the ranks add up.
    Cat,
    /// The weighted sum, to the largest of the ranks.
    Svd,
    /// The weighted sum of the largest elements of each delta.
    MagnitudePrune,
    /// The mean of the largest elements of each delta that agree in sign (Yadav et al. 2023).
    Ties,
    /// The weighted sum of random elements of each delta, grown to make up (Yu et al. 2024).
    DareLinear,
    /// The mean of random elements that agree in sign.
    DareTies,
}

/// How to combine adapters.
///
/// ```
/// use std::collections::BTreeMap;
/// use candle_core::{DType, Device, Tensor};
/// use lora_core::adapter::{AdapterWeights, Combination, LayerWeights, Method};
///
/// let adapter = |value: f32| -> candle_core::Result<AdapterWeights> {
///     let a = Tensor::full(value, (1, 3), &Device::Cpu)?;
///     let b = Tensor::ones((2, 1), DType::F32, &Device::Cpu)?;
///     let layer = LayerWeights { a, b, bias: None, alpha: 2.0, rslora: false };
///     let layers = BTreeMap::from([("q_proj".to_string(), layer)]);
///     Ok(AdapterWeights { layers, ..AdapterWeights::default() })
/// };
/// let (one, two) = (adapter(1.0)?, adapter(10.0)?);
/// let sum = Combination::new(Method::Linear).apply(&[(&one, 1.0), (&two, -0.5)])?;
/// let delta = sum.adapter.layers["q_proj"].delta()?.to_vec2::<f64>()?;
/// assert!((delta[0][0] - (2.0 - 10.0)).abs() < 1e-5);
/// assert_eq!(sum.adapter.layers["q_proj"].rank(), 1); // both go in one direction
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Combination {
    /// The rule.
    pub method: Method,
    /// The largest rank of a layer; `None`: what the rule says, for sparse rules the largest rank
    /// among the adapters.
    pub rank: Option<usize>,
    /// The share of elements that sparse rules keep, above 0 and at most 1.
    pub density: f64,
    /// How `ties` and `dare_ties` elect signs.
    pub election: Election,
    /// Of the elements that the `dare` rules drop.
    pub seed: u64,
}

impl Default for Combination {
    fn default() -> Self {
        Self {
            method: Method::default(),
            rank: None,
            density: 1.0,
            election: Election::default(),
            seed: 0,
        }
    }
}

/// An adapter made of others.
#[derive(Clone, Debug)]
pub struct Combined {
    /// The adapter; its scalings are 1, unless it is one of the given ones itself.
    pub adapter: AdapterWeights,
    /// By path, the share of the combined delta's squared norm that the rank could hold.
    pub energy: BTreeMap<String, f64>,
}

impl Combination {
    /// Combines by a rule, with every option at its default.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            ..Self::default()
        }
    }

    /// Sets the largest rank of a layer.
    pub fn rank(mut self, rank: usize) -> Self {
        self.rank = Some(rank);
        self
    }

    /// Sets the share of elements that sparse rules keep.
    pub fn density(mut self, density: f64) -> Self {
        self.density = density;
        self
    }

    /// Sets how signs are elected.
    pub fn election(mut self, election: Election) -> Self {
        self.election = election;
        self
    }

    /// Sets the seed of the `dare` rules.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Combines adapters, each with its weight, which may be negative.
    ///
    /// A single adapter is combined linearly whatever the rule, and with weight 1 it is itself. A
    /// layer that only some adapters have is combined of those. A whole tensor that was trained
    /// with one adapter is kept; of several adapters it must be the same.
    ///
    /// # Errors
    /// An [`Error::Adapter`] for options or weights that make no sense, adapters of different bases,
    /// layers whose shapes differ and whole tensors that do.
    pub fn apply(&self, adapters: &[(&AdapterWeights, f64)]) -> Result<Combined> {
        self.check(adapters)?;
        let mut combined = Combined {
            adapter: frame(adapters)?,
            energy: BTreeMap::new(),
        };
        if let [(adapter, 1.0)] = adapters
            && self
                .rank
                .is_none_or(|rank| adapter.layers.values().all(|layer| layer.rank() <= rank))
        {
            combined.adapter = (*adapter).clone();
            combined.energy = adapter
                .layers
                .keys()
                .map(|path| (path.clone(), 1.0))
                .collect();
            return Ok(combined);
        }
        let paths = adapters
            .iter()
            .flat_map(|(adapter, _)| adapter.layers.keys());
        let paths: std::collections::BTreeSet<&String> = paths.collect();
        for path in paths {
            let layers: Vec<(u64, &LayerWeights, f64)> = (0..)
                .zip(adapters)
                .filter_map(|(i, (adapter, weight))| Some((i, adapter.layers.get(path)?, *weight)))
                .collect();
            let single = adapters.len() == 1;
            let (layer, energy) =
                self.layer(path, &layers, single)
                    .map_err(|error| match error {
                        Error::Candle(error) => Error::module(path, error.to_string()),
                        other => other,
                    })?;
            combined.adapter.layers.insert(path.clone(), layer);
            combined.energy.insert(path.clone(), energy);
        }
        Ok(combined)
    }

    fn check(&self, adapters: &[(&AdapterWeights, f64)]) -> Result<()> {
        let problem = if adapters.is_empty() {
            "there is no adapter to combine".to_string()
        } else if self.rank == Some(0) {
            "rank 0 leaves nothing; it must be at least 1".to_string()
        } else if !(self.density > 0.0 && self.density <= 1.0) {
            format!("density {} is not above 0 and at most 1", self.density)
        } else if let Some((_, weight)) = adapters.iter().find(|(_, weight)| !weight.is_finite()) {
            format!("{weight} is no weight")
        } else {
            return Ok(());
        };
        Err(Error::Adapter(problem))
    }

    fn layer(
        &self,
        path: &str,
        layers: &[(u64, &LayerWeights, f64)],
        single: bool,
    ) -> Result<(LayerWeights, f64)> {
        let mut largest = 0;
        let mut dtype = DType::F32;
        for (_, layer, _) in layers {
            let shape = |layer: &LayerWeights| [layer.out_features(), layer.in_features()];
            let (first, this) = (shape(layers[0].1), shape(layer));
            if let Some(problem) = layer.problem() {
                return Err(Error::module(path, problem));
            }
            if first != this {
                let reason = format!(
                    "the adapters are of layers of different shapes, {first:?} and {this:?}"
                );
                return Err(Error::module(path, reason));
            }
            largest = largest.max(layer.rank());
            if layer.a.dtype() == DType::F64 {
                dtype = DType::F64;
            }
        }
        let products = layers
            .iter()
            .map(|(_, layer, weight)| Ok((Product::of(layer)?, *weight)))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let method = if single { Method::Linear } else { self.method };
        let truncated = match method {
            Method::Cat => {
                let product = Product::sum(&products)?;
                match self.rank {
                    Some(rank) if rank < product.a.dim(0)? => product.truncated(rank)?,
                    _ => Truncated {
                        product,
                        energy: 1.0,
                    },
                }
            }
            Method::Linear => {
                Product::sum(&products)?.truncated(self.rank.unwrap_or(usize::MAX))?
            }
            Method::Svd => Product::sum(&products)?.truncated(self.rank.unwrap_or(largest))?,
            _ => {
                let deltas = products
                    .iter()
                    .map(|(product, weight)| Ok((product.dense()?, *weight)))
                    .collect::<candle_core::Result<Vec<_>>>()?;
                let delta = self.sparse(deltas, path, layers)?;
                super::dense::truncated(&delta, self.rank.unwrap_or(largest))?
            }
        };
        let bias = self.bias(path, layers, method)?;
        let Truncated { product, energy } = truncated;
        let rank = product.a.dim(0)?;
        let layer = LayerWeights {
            a: product.a.to_dtype(dtype)?.contiguous()?,
            b: product.b.to_dtype(dtype)?.contiguous()?,
            bias: bias.map(|bias| bias.to_dtype(dtype)).transpose()?,
            alpha: rank as f64,
            rslora: false,
        };
        Ok((layer, energy))
    }

    /// The bias of the combined layer: the same rule for the scaled biases.
    fn bias(
        &self,
        path: &str,
        layers: &[(u64, &LayerWeights, f64)],
        method: Method,
    ) -> candle_core::Result<Option<Tensor>> {
        if layers.iter().all(|(_, layer, _)| layer.bias.is_none()) {
            return Ok(None);
        }
        let terms = layers
            .iter()
            .map(|(_, layer, weight)| {
                let bias = match &layer.bias {
                    Some(bias) => bias.to_dtype(DType::F64)?,
                    None => Tensor::zeros(layer.out_features(), DType::F64, layer.b.device())?,
                };
                let bias = (bias * layer.scaling())?;
                Ok((bias.to_device(&candle_core::Device::Cpu)?, *weight))
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Some(match method {
            Method::Linear | Method::Cat | Method::Svd => weighted(&terms)?,
            _ => self.sparse(terms, &format!("{path}.bias"), layers)?,
        }))
    }

    fn sparse(
        &self,
        deltas: Vec<(Tensor, f64)>,
        path: &str,
        layers: &[(u64, &LayerWeights, f64)],
    ) -> candle_core::Result<Tensor> {
        let dare = matches!(self.method, Method::DareLinear | Method::DareTies);
        let [low, high] = halves(path_hash(path));
        let sparse = deltas
            .into_iter()
            .zip(layers)
            .map(|((delta, weight), (index, ..))| {
                let kept = if dare {
                    sparse::dropped(&delta, self.density, (self.seed, low ^ high, *index))
                } else {
                    sparse::pruned(&delta, self.density)
                };
                Ok((kept?, weight))
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        match self.method {
            Method::Ties | Method::DareTies => sparse::elected(&sparse, self.election),
            _ => weighted(&sparse),
        }
    }
}

/// `Σ weightᵢ · tensorᵢ`
fn weighted(terms: &[(Tensor, f64)]) -> candle_core::Result<Tensor> {
    let mut sum = terms[0].0.zeros_like()?;
    for (tensor, weight) in terms {
        sum = (sum + (tensor * *weight)?)?;
    }
    Ok(sum)
}

/// All of the combined adapter but its layers.
fn frame(adapters: &[(&AdapterWeights, f64)]) -> Result<AdapterWeights> {
    let mut frame = AdapterWeights::default();
    for (i, (adapter, _)) in adapters.iter().enumerate() {
        for (name, tensor) in &adapter.saved {
            match frame.saved.get(name) {
                None => {
                    frame.saved.insert(name.clone(), tensor.clone());
                }
                Some(other) if is_equal(other, tensor)? => {}
                Some(_) => {
                    return Err(Error::Adapter(format!(
                        "`{name}` was trained as a whole with several adapters and differs; \
                         whole tensors can't be combined"
                    )));
                }
            }
        }
        for entry in &adapter.modules_to_save {
            if !frame.modules_to_save.contains(entry) {
                frame.modules_to_save.push(entry.clone());
            }
        }
        if frame.bias == BiasMode::None {
            frame.bias = adapter.bias;
        } else if adapter.bias == BiasMode::All {
            frame.bias = BiasMode::All;
        }
        for path in &adapter.excluded {
            if !frame.excluded.contains(path) {
                frame.excluded.push(path.clone());
            }
        }
        if i == 0 {
            frame.dropout = adapter.dropout;
            frame.dropout_position = adapter.dropout_position;
            frame.origin = adapter.origin.clone();
            continue;
        }
        let first = adapters[0].0;
        if adapter.dropout != first.dropout || adapter.dropout_position != first.dropout_position {
            frame.dropout = 0.0;
        }
        let same_layers = adapter.layers.keys().eq(first.layers.keys());
        match (&first.origin.fingerprint, &adapter.origin.fingerprint) {
            (Some(one), Some(other)) if same_layers && one != other => {
                return Err(Error::Adapter(
                    "the adapters were trained on different bases: their fingerprints differ; \
                     clear origin.fingerprint to combine them all the same (`lora combine \
                     --any-base` does)"
                        .into(),
                ));
            }
            // A fingerprint is of the adapted layers: of others together we know none.
            _ if !same_layers => frame.origin.fingerprint = None,
            (None, Some(_)) | (Some(_), None) => frame.origin.fingerprint = None,
            _ => {}
        }
        let same = |one: &mut Option<String>, other: &Option<String>| {
            if one != other {
                *one = None;
            }
        };
        same(&mut frame.origin.base_model, &adapter.origin.base_model);
        same(&mut frame.origin.revision, &adapter.origin.revision);
        same(&mut frame.origin.task_type, &adapter.origin.task_type);
    }
    let layers = |path: &String| {
        adapters
            .iter()
            .any(|(adapter, _)| adapter.layers.contains_key(path))
    };
    frame.excluded.retain(|path| !layers(path));
    Ok(frame)
}

pub(super) fn is_equal(one: &Tensor, other: &Tensor) -> candle_core::Result<bool> {
    if one.dims() != other.dims() || one.dtype() != other.dtype() {
        return Ok(false);
    }
    let f64s = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    Ok(f64s(one)? == f64s(other)?)
}

impl Method {
    const NAMES: [(&str, Self); 7] = [
        ("linear", Self::Linear),
        ("cat", Self::Cat),
        ("svd", Self::Svd),
        ("magnitude_prune", Self::MagnitudePrune),
        ("ties", Self::Ties),
        ("dare_linear", Self::DareLinear),
        ("dare_ties", Self::DareTies),
    ];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, method)| method == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, method)| *method).ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            format!("unknown method `{name}`; known are {}", names.join(", "))
        })
    }
}
