//! A plan as tables, for people to read.

use std::fmt;

use super::{LoraPlan, TrainedFor};

impl fmt::Display for LoraPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self
            .trained
            .iter()
            .map(|tensor| format!("{}.{}", tensor.path, tensor.name))
            .collect();
        let adapted = self.adapted.iter().map(|adapter| adapter.path.len());
        let skipped = self.not_adapted.iter().map(|layer| layer.path.len());
        let widths = adapted.chain(skipped).chain(names.iter().map(String::len));
        let width = widths.max().unwrap_or(0).max("trained whole".len());

        writeln!(
            f,
            "{:width$}  {:>13}  {:>4}  {:>6}  {:>8}  {:>10}  {:>10}  {:>11}",
            "adapted", "in x out", "r", "alpha", "scaling", "parameters", "bytes", "saved/token"
        )?;
        for adapter in &self.adapted {
            let shape = format!("{} x {}", adapter.in_features, adapter.out_features);
            write!(
                f,
                "{:width$}  {shape:>13}  {:>4}  {:>6}  {:>8}  {:>10}  {:>10}  {:>11}",
                adapter.path,
                adapter.rank,
                adapter.alpha,
                rounded(adapter.scaling),
                adapter.parameters,
                adapter.bytes,
                adapter.saved_bytes_per_token,
            )?;
            if adapter.is_rank_wasted() {
                write!(f, "  rank exceeds min(in, out)")?;
            }
            writeln!(f)?;
        }
        if !self.trained.is_empty() {
            let (parameters, bytes) = ("parameters", "bytes");
            writeln!(
                f,
                "\n{:width$}  {parameters:>13}  {bytes:>13}",
                "trained whole"
            )?;
        }
        for (tensor, name) in self.trained.iter().zip(names) {
            let (parameters, bytes) = (tensor.parameters, tensor.bytes);
            writeln!(
                f,
                "{name:width$}  {parameters:>13}  {bytes:>13}  {}",
                tensor.reason
            )?;
        }
        if !self.not_adapted.is_empty() {
            writeln!(f, "\nnot adapted")?;
        }
        for layer in &self.not_adapted {
            writeln!(f, "{:width$}  {}", layer.path, layer.reason)?;
        }

        let trainable = self.trainable_parameters();
        writeln!(
            f,
            "\n{} layers adapted, {} not; everything that is not listed is frozen",
            self.adapted.len(),
            self.not_adapted.len(),
        )?;
        writeln!(
            f,
            "trainable parameters: {trainable} of {} ({:.3} %), {}",
            self.base_parameters.saturating_add(trainable),
            100.0 * self.trainable_share(),
            binary(self.trainable_bytes()),
        )?;
        let saved = binary(self.saved_bytes_per_token());
        write!(f, "saved for the backward pass: at most {saved} a token")?;
        if !self.fused {
            write!(f, " if fused; use_fused = false keeps more")?;
        }
        Ok(())
    }
}

impl fmt::Display for TrainedFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ModulesToSave(entry) => write!(f, "modules_to_save `{entry}`"),
            Self::Bias => f.write_str("bias"),
        }
    }
}

/// Four digits after the point at most.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Bytes in the largest unit of which there is one.
fn binary(bytes: usize) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut amount = bytes as f64;
    let mut unit = "bytes";
    for larger in units {
        if amount < 1024.0 {
            break;
        }
        amount /= 1024.0;
        unit = larger;
    }
    format!("{} {unit}", (amount * 100.0).round() / 100.0)
}
