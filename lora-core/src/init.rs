//! How `lora_A` begins. `lora_B` begins at zero, so that a fresh adapter changes nothing.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::philox::{halves, path_hash, philox};

/// The distribution from which `lora_A`, of shape `[rank, in]`, is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum LoraInit {
    /// `xavier`: normal with variance `2 / (in + rank)` (Glorot & Bengio 2010).
    ///
    /// NeMo AutoModel's releases up to v0.2 drew from U(0, 1) under this name; this is the rule
    /// of its v0.3 and later.
    #[default]
    Xavier,
    /// `kaiming`, or `uniform`: uniform in `±1/√in` (He et al. 2015 with a = √5), as PEFT's `true`.
    Kaiming,
    /// `gaussian`: normal with standard deviation `1 / rank`, as PEFT's `"gaussian"`.
    Gaussian,
}

impl LoraInit {
    const NAMES: [(&str, Self); 4] = [
        ("xavier", Self::Xavier),
        ("kaiming", Self::Kaiming),
        ("uniform", Self::Kaiming),
        ("gaussian", Self::Gaussian),
    ];

    /// Draws `lora_A` for the module at `path`.
    ///
    /// Element `i` in row-major order takes word `i % 4` of Philox block `i / 4`, keyed by the
    /// seed and the path: nothing else influences it.
    pub(crate) fn draw(
        self,
        shape: (usize, usize),
        seed: u64,
        path: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let (rank, width) = shape;
        let [site_low, site_high] = halves(path_hash(path));
        let block = |index: u64| {
            let [low, high] = halves(index);
            philox::<10>([low, high, site_low, site_high], halves(seed))
                // The middle of each of 2^32 intervals: never 0, never 1.
                .map(|word| (f64::from(word) + 0.5) / 4_294_967_296.0)
        };
        let normal = |[a, b, c, d]: [f64; 4]| {
            // Box & Muller 1958, twice.
            let pair = |u: f64, v: f64| {
                let radius = (-2.0 * u.ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
                [radius * cos, radius * sin]
            };
            let ([a, b], [c, d]) = (pair(a, b), pair(c, d));
            [a, b, c, d]
        };
        let values = (0..(rank * width).div_ceil(4) as u64)
            .flat_map(|index| {
                let uniform = block(index);
                match self {
                    Self::Xavier => {
                        let std = (2.0 / (width + rank) as f64).sqrt();
                        normal(uniform).map(|z| z * std)
                    }
                    Self::Kaiming => {
                        let bound = 1.0 / (width as f64).sqrt();
                        uniform.map(|u| (2.0 * u - 1.0) * bound)
                    }
                    Self::Gaussian => normal(uniform).map(|z| z / rank as f64),
                }
            })
            .take(rank * width)
            .collect::<Vec<f64>>();
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)
    }
}

impl FromStr for LoraInit {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, init)| *init)
            .ok_or_else(|| {
                format!(
                    "unknown initialisation `{name}`; known are xavier, kaiming, uniform, gaussian"
                )
            })
    }
}

impl TryFrom<String> for LoraInit {
    type Error = String;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<LoraInit> for String {
    fn from(init: LoraInit) -> Self {
        init.to_string()
    }
}

impl fmt::Display for LoraInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xavier => "xavier",
            Self::Kaiming => "kaiming",
            Self::Gaussian => "gaussian",
        })
    }
}
