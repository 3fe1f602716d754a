//! What is in an adapter, for people to read.

use std::fmt;

use serde::Serialize;

use super::{AdapterWeights, tensors};
use crate::{BiasMode, DropoutPosition, Result};

/// What is in an adapter. It prints as a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The adapted layers, by path.
    pub sites: Vec<InspectedSite>,
    /// The whole tensors that were trained with them, by name.
    pub saved: Vec<InspectedTensor>,
    /// The probability of dropout.
    pub dropout: f64,
    /// The side of the adapter that dropout applied to.
    pub dropout_position: DropoutPosition,
    /// Which of the base's biases were trained.
    pub bias: BiasMode,
    /// The modules that were trained as a whole.
    pub modules_to_save: Vec<String>,
    /// The base that it was trained on, by name.
    pub base_model: Option<String>,
    /// PEFT's name of the task.
    pub task_type: Option<String>,
    /// The base that it was trained on, by its weights.
    pub base_fingerprint: Option<String>,
    /// What reading it noticed.
    pub notes: Vec<String>,
}

/// An adapted layer in an [`Inspection`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedSite {
    /// The path of the layer.
    pub path: String,
    /// The width of its input.
    pub in_features: usize,
    /// The width of its output.
    pub out_features: usize,
    /// The rank of the adapter.
    pub rank: usize,
    /// Alpha.
    pub alpha: f64,
    /// What `B A` is multiplied by.
    pub scaling: f64,
    /// Whether alpha is divided by the rank's root.
    pub rslora: bool,
    /// Whether `B` has a bias.
    pub lora_bias: bool,
    /// The Frobenius norm of what it adds to the weight.
    pub norm: f64,
    /// The type of its numbers; of `A` and `B`, where they differ.
    pub dtype: String,
    /// The bytes of its tensors.
    pub bytes: u64,
}

/// A whole tensor in an [`Inspection`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InspectedTensor {
    /// Module path and parameter.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type of its numbers.
    pub dtype: String,
    /// Its bytes.
    pub bytes: u64,
}

impl Inspection {
    /// Looks at an adapter.
    ///
    /// # Errors
    /// Those of candle, if the shapes of a layer don't fit.
    pub fn of(adapter: &AdapterWeights) -> Result<Self> {
        let sites = adapter
            .layers
            .iter()
            .map(|(path, layer)| {
                let (a, b) = (layer.a.dtype().as_str(), layer.b.dtype().as_str());
                Ok(InspectedSite {
                    path: path.clone(),
                    in_features: layer.in_features(),
                    out_features: layer.out_features(),
                    rank: layer.rank(),
                    alpha: layer.alpha,
                    scaling: layer.scaling(),
                    rslora: layer.rslora,
                    lora_bias: layer.bias.is_some(),
                    norm: layer.norm()?,
                    dtype: if a == b {
                        a.into()
                    } else {
                        format!("{a}, {b}")
                    },
                    bytes: layer.bytes(),
                })
            })
            .collect::<Result<_>>()?;
        let saved = adapter.saved.iter().map(|(name, tensor)| InspectedTensor {
            name: name.clone(),
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype().as_str().into(),
            bytes: tensors::size(tensor),
        });
        let origin = &adapter.origin;
        Ok(Self {
            sites,
            saved: saved.collect(),
            dropout: adapter.dropout,
            dropout_position: adapter.dropout_position,
            bias: adapter.bias,
            modules_to_save: adapter.modules_to_save.clone(),
            base_model: origin.base_model.clone(),
            task_type: origin.task_type.clone(),
            base_fingerprint: origin.fingerprint.as_ref().map(ToString::to_string),
            notes: adapter.notes.clone(),
        })
    }

    /// The parameters of all adapters: `Σ rank · (in + out)`, and biases.
    pub fn parameters(&self) -> usize {
        let of = |site: &InspectedSite| {
            let bias = if site.lora_bias { site.out_features } else { 0 };
            site.rank * (site.in_features + site.out_features) + bias
        };
        self.sites.iter().map(of).sum()
    }

    /// The bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let sites = self.sites.iter().map(|site| site.bytes);
        sites
            .chain(self.saved.iter().map(|tensor| tensor.bytes))
            .sum()
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = self.sites.iter().map(|site| site.path.len());
        let width = paths.max().unwrap_or(0).max("layer".len());
        writeln!(
            f,
            "{:width$}  {:>13}  {:>4}  {:>7}  {:>9}  {:>10}  {:>5}  {:>10}",
            "layer", "in x out", "r", "alpha", "scaling", "norm", "type", "bytes"
        )?;
        for site in &self.sites {
            let shape = format!("{} x {}", site.in_features, site.out_features);
            write!(
                f,
                "{:width$}  {shape:>13}  {:>4}  {:>7}  {:>9.4}  {:>10.4}  {:>5}  {:>10}",
                site.path,
                site.rank,
                rounded(site.alpha),
                site.scaling,
                site.norm,
                site.dtype,
                site.bytes,
            )?;
            if site.rslora {
                write!(f, "  rslora")?;
            }
            if site.lora_bias {
                write!(f, "  bias")?;
            }
            writeln!(f)?;
        }
        for tensor in &self.saved {
            let (name, shape) = (&tensor.name, &tensor.shape);
            writeln!(
                f,
                "{name}  {shape:?}  {}  {} bytes",
                tensor.dtype, tensor.bytes
            )?;
        }
        if let Some(base) = &self.base_model {
            writeln!(f, "base: {base}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(
            f,
            "{} layers, {} whole tensors; {} adapter parameters, {} bytes",
            self.sites.len(),
            self.saved.len(),
            self.parameters(),
            self.bytes(),
        )
    }
}

/// At most four decimals, and none that are zero.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
