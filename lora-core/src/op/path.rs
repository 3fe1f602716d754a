//! How an adapted layer is computed.

use std::fmt;

/// How an adapted layer computes its forward pass, and why not faster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ComputePath {
    /// The frozen base alone: no adapter acts.
    Base,
    /// One operation of fused loops, on the CPU.
    Fused,
    /// `lora-kernels` on a CUDA device; which of its paths, and why not the faster one, in its words.
    Kernels(String),
    /// Candle's operations, for the reason given.
    Composed(&'static str),
}

impl fmt::Display for ComputePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::Fused => f.write_str("fused"),
            Self::Kernels(path) => write!(f, "kernels: {path}"),
            Self::Composed(reason) => write!(f, "composed: {reason}"),
        }
    }
}
