//! How an adapter begins. Unless the configuration says otherwise `lora_B` is zero, so that a fresh
//! adapter changes nothing.
//!
//! Every tensor has a stream of numbers of its own, keyed by the seed and its name: nothing else
//! influences it, neither the order of the layers nor threads nor the device. Number `i` takes word
//! `i % 4` of Philox block `i / 4`. PEFT rounds its draws through the type of the base; here they
//! are rounded once, to the type of the adapter.

use std::{fmt, str::FromStr};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    AdapterConfig, Result,
    philox::{halves, path_hash, philox},
};

/// The distribution from which `lora_A`, of shape `[rank, in]`, is drawn, and what becomes of
/// `lora_B`.
///
/// PEFT's `init_lora_weights` is read too: `true` is `kaiming`, and `false` is written as such.
///
/// ```
/// use lora_core::LoraInit;
///
/// let read = |json| serde_json::from_str::<LoraInit>(json);
/// assert_eq!(read("true")?, LoraInit::Kaiming);
/// assert_eq!(read("false")?, LoraInit::RandomB);
/// assert_eq!(read("\"orthogonal\"")?, LoraInit::Orthogonal);
/// assert!(read("\"pissa\"").is_err());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// `orthogonal`: normal factors in orthogonal subspaces of the rank's dimensions, so that
    /// `B A = 0` though neither is zero, as PEFT's `"orthogonal"`. The rank must be even.
    Orthogonal,
    /// `false`: `A` as by `kaiming`, `B` and the adapter's bias uniform in `±1/√rank`, as PEFT's
    /// `false`. Such an adapter changes the model at once; it is for tests.
    RandomB,
}

impl LoraInit {
    const NAMES: [(&str, Self); 6] = [
        ("xavier", Self::Xavier),
        ("kaiming", Self::Kaiming),
        ("uniform", Self::Kaiming),
        ("gaussian", Self::Gaussian),
        ("orthogonal", Self::Orthogonal),
        ("false", Self::RandomB),
    ];
}

/// The tensors of a fresh adapter.
pub(crate) struct Fresh {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// `[out]`, if the adapter has one.
    pub bias: Option<Tensor>,
}

impl AdapterConfig {
    /// Draws the adapter of the layer at `path`.
    ///
    /// # Errors
    /// If the layer can't have one.
    pub(crate) fn draw(&self, path: &str, weight: &Tensor) -> Result<Fresh> {
        let shape = self.fit(path, weight)?;
        let (rank, inputs, outputs) = (self.dim, shape.inputs, shape.outputs);
        let device = weight.device();
        let finish = |tensor: Tensor| tensor.to_dtype(shape.dtype)?.to_device(device);
        let stream = |part: &str| Stream::new(self.seed, &format!("{path}{part}"));
        let bound = 1.0 / (rank as f64).sqrt();
        let (a, b) = match self.lora_a_init {
            LoraInit::Orthogonal => {
                let basis = orthonormal_rows(stream(".orthogonal").normal((rank, rank), |z| z)?)?;
                // Every other row, so that the two halves are orthogonal to each other.
                let half = |from| -> candle_core::Result<Tensor> {
                    let rows = basis.iter().skip(from).step_by(2).flatten();
                    Tensor::from_iter(rows.copied(), &Device::Cpu)?.reshape((rank / 2, rank))
                };
                let a = stream("").normal((rank / 2, inputs), |z| z / 10.0)?;
                let b = stream(".lora_B.weight").normal((outputs, rank / 2), |z| z / 10.0)?;
                (half(0)?.t()?.matmul(&a)?, b.matmul(&half(1)?)?)
            }
            init => {
                let a = match init {
                    LoraInit::Xavier => {
                        let std = (2.0 / (inputs + rank) as f64).sqrt();
                        stream("").normal((rank, inputs), |z| z * std)
                    }
                    LoraInit::Gaussian => stream("").normal((rank, inputs), |z| z / rank as f64),
                    _ => stream("").uniform((rank, inputs), 1.0 / (inputs as f64).sqrt()),
                }?;
                let b = match init {
                    LoraInit::RandomB => {
                        stream(".lora_B.weight").uniform((outputs, rank), bound)?
                    }
                    _ => Tensor::zeros((outputs, rank), shape.dtype, device)?,
                };
                (a, b)
            }
        };
        let bias = match (self.lora_bias, self.lora_a_init) {
            (false, _) => None,
            (true, LoraInit::RandomB) => {
                Some(finish(stream(".lora_B.bias").uniform(outputs, bound)?)?)
            }
            (true, _) => Some(Tensor::zeros(outputs, shape.dtype, device)?),
        };
        Ok(Fresh {
            a: finish(a)?,
            b: finish(b)?,
            bias,
        })
    }
}

/// The random numbers of one tensor.
struct Stream {
    seed: u64,
    name: u64,
}

impl Stream {
    fn new(seed: u64, name: &str) -> Self {
        let name = path_hash(name);
        Self { seed, name }
    }

    /// Four numbers in (0, 1).
    fn block(&self, index: u64) -> [f64; 4] {
        let ([low, high], [name_low, name_high]) = (halves(index), halves(self.name));
        philox::<10>([low, high, name_low, name_high], halves(self.seed))
            // The middle of each of 2^32 intervals: never 0, never 1.
            .map(|word| (f64::from(word) + 0.5) / 4_294_967_296.0)
    }

    fn tensor(
        self,
        shape: impl Into<candle_core::Shape>,
        map: impl Fn([f64; 4]) -> [f64; 4],
    ) -> candle_core::Result<Tensor> {
        let shape = shape.into();
        let count = shape.elem_count();
        let values = (0..count.div_ceil(4) as u64)
            .flat_map(|index| map(self.block(index)))
            .take(count)
            .collect::<Vec<f64>>();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// Uniform numbers in `±bound`, in f64.
    fn uniform(
        self,
        shape: impl Into<candle_core::Shape>,
        bound: f64,
    ) -> candle_core::Result<Tensor> {
        self.tensor(shape, |block| block.map(|u| (2.0 * u - 1.0) * bound))
    }

    /// Standard normal numbers with `map` applied, in f64.
    fn normal(
        self,
        shape: impl Into<candle_core::Shape>,
        map: impl Fn(f64) -> f64,
    ) -> candle_core::Result<Tensor> {
        self.tensor(shape, |[a, b, c, d]| {
            // Box & Muller 1958, twice.
            let pair = |u: f64, v: f64| {
                let radius = (-2.0 * u.ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
                [radius * cos, radius * sin]
            };
            let ([a, b], [c, d]) = (pair(a, b), pair(c, d));
            [a, b, c, d].map(&map)
        })
    }
}

/// The rows of a square matrix made orthonormal, each within the span of those up to it.
fn orthonormal_rows(matrix: Tensor) -> candle_core::Result<Vec<Vec<f64>>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut rows = matrix.to_vec2::<f64>()?;
    for i in 0..rows.len() {
        let (done, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        // The second pass takes away what rounding left of the first.
        for other in done.iter().chain(done.iter()) {
            let along = dot(row, other);
            row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
        }
        let norm = dot(row, row).sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    Ok(rows)
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
                    "unknown initialisation `{name}`; known are xavier, kaiming, uniform, gaussian, \
                     orthogonal, false"
                )
            })
    }
}

impl<'de> Deserialize<'de> for LoraInit {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected the name of an initialisation, true or false"
        )]
        enum NameOrBool {
            Name(String),
            Bool(bool),
        }

        match NameOrBool::deserialize(from)? {
            NameOrBool::Name(name) => name.parse().map_err(D::Error::custom),
            NameOrBool::Bool(true) => Ok(Self::Kaiming),
            NameOrBool::Bool(false) => Ok(Self::RandomB),
        }
    }
}

impl Serialize for LoraInit {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::RandomB => to.serialize_bool(false),
            named => to.collect_str(named),
        }
    }
}

impl fmt::Display for LoraInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xavier => "xavier",
            Self::Kaiming => "kaiming",
            Self::Gaussian => "gaussian",
            Self::Orthogonal => "orthogonal",
            Self::RandomB => "false",
        })
    }
}
