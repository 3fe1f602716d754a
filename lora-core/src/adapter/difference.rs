//! How two adapters differ, layer by layer.

use std::{collections::BTreeSet, fmt};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::{AdapterWeights, LayerWeights, product::Product};
use crate::{Error, Result};

/// How two adapters differ. It prints as a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Every layer that either adapts, by path.
    pub sites: Vec<SiteDifference>,
    /// The whole tensors that differ, or that only one has, by name.
    pub saved: Vec<String>,
}

/// A layer in a [`Difference`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SiteDifference {
    /// The path of the layer.
    pub path: String,
    /// The first adapter's rank; `None`: it has no such layer.
    pub first_rank: Option<usize>,
    /// The second adapter's rank.
    pub second_rank: Option<usize>,
    /// The Frobenius norm of what the first adds to the weight; 0 without it.
    pub first_norm: f64,
    /// The same of the second.
    pub second_norm: f64,
    /// The norm of the difference.
    pub norm: f64,
    /// The norm of the difference of what their own biases (`lora_bias`) add to the output.
    pub bias_norm: f64,
    /// The cosine between both; `None` if either is zero or missing, or the shapes differ.
    pub cosine: Option<f64>,
    /// Whether the layers have the same input and output widths.
    pub same_shape: bool,
}

impl Difference {
    /// Compares two adapters. Factors are not compared: what they add to the weight is.
    ///
    /// # Errors
    /// An [`Error::Module`] if the shapes of a layer don't fit each other.
    pub fn between(first: &AdapterWeights, second: &AdapterWeights) -> Result<Self> {
        let paths: BTreeSet<_> = first.layers.keys().chain(second.layers.keys()).collect();
        let sites = paths
            .into_iter()
            .map(|path| {
                let layers = [first.layers.get(path), second.layers.get(path)];
                site(path, layers).map_err(|error| Error::module(path, error.to_string()))
            })
            .collect::<Result<_>>()?;
        let names: BTreeSet<_> = first.saved.keys().chain(second.saved.keys()).collect();
        let mut saved = Vec::new();
        for name in names {
            let same = match (first.saved.get(name), second.saved.get(name)) {
                (Some(one), Some(other)) if one.dims() == other.dims() => {
                    let (one, other) = (one.to_dtype(DType::F64)?, other.to_dtype(DType::F64)?);
                    one.elem_count() == 0
                        || (one - other)?
                            .abs()?
                            .flatten_all()?
                            .max(0)?
                            .to_scalar::<f64>()?
                            == 0.0
                }
                _ => false,
            };
            if !same {
                saved.push(name.clone());
            }
        }
        Ok(Self { sites, saved })
    }

    /// Whether both do the same, up to rounding in f64.
    pub fn is_none(&self) -> bool {
        const ROUNDING: f64 = 1e-12;
        self.saved.is_empty()
            && self.sites.iter().all(|site| {
                let both = site.first_rank.is_some() == site.second_rank.is_some();
                both && site.same_shape
                    && site.norm <= ROUNDING * site.first_norm.max(site.second_norm)
                    && site.bias_norm == 0.0
            })
    }
}

fn site(path: &str, layers: [Option<&LayerWeights>; 2]) -> candle_core::Result<SiteDifference> {
    let products = layers.map(|layer| layer.map(Product::of).transpose());
    let [first, second] = products;
    let (first, second) = (first?, second?);
    let norm = |product: &Option<Product>| product.as_ref().map_or(Ok(0.0), Product::norm);
    let (first_norm, second_norm) = (norm(&first)?, norm(&second)?);
    let shapes = layers.map(|layer| layer.map(|layer| (layer.out_features(), layer.in_features())));
    let (mut difference, mut cosine, mut same_shape) = (first_norm.hypot(second_norm), None, true);
    if let [Some(one), Some(other)] = shapes {
        same_shape = one == other;
    }
    if let (Some(first), Some(second)) = (first, second)
        && same_shape
    {
        if first_norm > 0.0 && second_norm > 0.0 {
            let cos = first.dot(&second)? / first_norm / second_norm;
            cosine = Some(cos.clamp(-1.0, 1.0));
        }
        difference = Product::sum(&[(first, 1.0), (second, -1.0)])?.norm()?;
    }
    Ok(SiteDifference {
        path: path.to_string(),
        first_rank: layers[0].map(LayerWeights::rank),
        second_rank: layers[1].map(LayerWeights::rank),
        first_norm,
        second_norm,
        norm: difference,
        bias_norm: bias_norm(layers)?,
        cosine,
        same_shape,
    })
}

fn bias_norm(layers: [Option<&LayerWeights>; 2]) -> candle_core::Result<f64> {
    let scaled = |layer: Option<&LayerWeights>| -> candle_core::Result<Option<Tensor>> {
        let Some((layer, bias)) = layer.and_then(|layer| Some((layer, layer.bias.as_ref()?)))
        else {
            return Ok(None);
        };
        let bias = bias.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        Ok(Some((bias * layer.scaling())?))
    };
    let difference = match (scaled(layers[0])?, scaled(layers[1])?) {
        (Some(first), Some(second)) if first.dims() == second.dims() => (first - second)?,
        (Some(first), Some(second)) => Tensor::cat(&[first, second], 0)?,
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => return Ok(0.0),
    };
    Ok(difference.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = self.sites.iter().map(|site| site.path.len());
        let width = paths.max().unwrap_or(0).max("layer".len());
        writeln!(
            f,
            "{:width$}  {:>9}  {:>10}  {:>10}  {:>10}  {:>7}",
            "layer", "r", "norm", "norm", "difference", "cosine"
        )?;
        for site in &self.sites {
            let rank = |rank: Option<usize>| rank.map_or("-".into(), |rank| rank.to_string());
            let ranks = format!("{} / {}", rank(site.first_rank), rank(site.second_rank));
            let cosine = site
                .cosine
                .map_or("-".into(), |cosine| format!("{cosine:.4}"));
            write!(
                f,
                "{:width$}  {ranks:>9}  {:>10.4}  {:>10.4}  {:>10.4}  {cosine:>7}",
                site.path, site.first_norm, site.second_norm, site.norm,
            )?;
            let remark = match (site.first_rank, site.second_rank) {
                (Some(_), None) => "  only in the first",
                (None, Some(_)) => "  only in the second",
                _ if !site.same_shape => "  shapes differ",
                _ if site.bias_norm > 0.0 => "  lora_bias differs",
                _ => "",
            };
            writeln!(f, "{remark}")?;
        }
        for name in &self.saved {
            writeln!(f, "{name}  differs")?;
        }
        let differs = |site: &&SiteDifference| site.norm > 0.0 || site.bias_norm > 0.0;
        let differ = self.sites.iter().filter(differs).count();
        write!(
            f,
            "{differ} of {} layers and {} whole tensors differ",
            self.sites.len(),
            self.saved.len()
        )
    }
}
