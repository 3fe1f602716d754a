//! What was adapted, for people to read.

use std::fmt;

use crate::LoraAdapter;

/// An adapter in a [`LoraReport`].
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSite {
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
    /// Whether the adapter has a bias of its own.
    pub lora_bias: bool,
}

impl LoraSite {
    pub(crate) fn of(path: &str, lora: &LoraAdapter) -> Self {
        Self {
            path: path.to_string(),
            in_features: lora.lora_a().dims()[1],
            out_features: lora.lora_b().dims()[0],
            rank: lora.rank(),
            alpha: lora.alpha(),
            scaling: lora.scaling(),
            lora_bias: lora.lora_bias().is_some(),
        }
    }

    /// The adapter's parameters: `rank · (in + out)`, and `out` for its bias.
    pub fn parameters(&self) -> usize {
        let bias = if self.lora_bias { self.out_features } else { 0 };
        self.rank * (self.in_features + self.out_features) + bias
    }

    /// Whether the rank exceeds what the layer can use: a product of `[out, in]` has rank
    /// `min(in, out)` at most.
    pub fn is_rank_wasted(&self) -> bool {
        self.rank > self.in_features.min(self.out_features)
    }
}

/// The adapters of a model, one line each, and the trainable share of its parameters.
///
/// It prints as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraReport {
    /// The adapters in declaration order.
    pub sites: Vec<LoraSite>,
    /// The parameters of all layers, adapters not counted; shared ones count once.
    pub base_parameters: usize,
    /// The parameters of the base that are trained too, each in a copy of its own.
    pub saved_parameters: usize,
    /// What reading an adapter noticed that is no error, such as a target without tensors.
    pub notes: Vec<String>,
}

impl LoraReport {
    /// The parameters of all adapters and of what is trained with them: everything that is trained.
    pub fn trainable_parameters(&self) -> usize {
        let adapters: usize = self.sites.iter().map(LoraSite::parameters).sum();
        adapters + self.saved_parameters
    }
}

impl fmt::Display for LoraReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = self.sites.iter().map(|site| site.path.len());
        let width = paths.max().unwrap_or(0).max("layer".len());
        writeln!(
            f,
            "{:width$}  {:>13}  {:>4}  {:>6}  {:>10}",
            "layer", "in x out", "r", "alpha", "parameters"
        )?;
        for site in &self.sites {
            let shape = format!("{} x {}", site.in_features, site.out_features);
            write!(
                f,
                "{:width$}  {shape:>13}  {:>4}  {:>6}  {:>10}",
                site.path,
                site.rank,
                site.alpha,
                site.parameters(),
            )?;
            if site.is_rank_wasted() {
                write!(f, "  rank exceeds min(in, out)")?;
            }
            writeln!(f)?;
        }
        if self.saved_parameters > 0 {
            let copies = "copies of the base's own";
            writeln!(f, "{copies:width$}  {:>39}", self.saved_parameters)?;
        }
        let trainable = self.trainable_parameters();
        let all = self.base_parameters + trainable;
        let share = 100.0 * trainable as f64 / all.max(1) as f64;
        write!(
            f,
            "{} layers; trainable parameters: {trainable} of {all} ({share:.3} %)",
            self.sites.len(),
        )?;
        self.notes
            .iter()
            .try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}
