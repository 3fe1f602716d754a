//! Which base an adapter was trained on, told by a sample of its weights.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Where a safetensors file's metadata keep it.
pub(super) const METADATA_KEY: &str = "lora_core.base_fingerprint";

/// A number for the base weights that an adapter belongs to.
///
/// SHA-256 over path, shape and a sample of each weight: four rows, evenly spaced, of which the
/// first 64 numbers count. They are rounded to bf16 first, so that a base loaded in another type
/// is still the same base.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use lora_core::adapter::Fingerprint;
///
/// let weight = Tensor::arange(0f32, 6.0, &Device::Cpu)?.reshape((2, 3))?;
/// let one = Fingerprint::of([("q_proj", &weight)])?;
/// assert_eq!(one, Fingerprint::of([("q_proj", &weight.to_dtype(DType::BF16)?)])?);
/// assert_ne!(one, Fingerprint::of([("q_proj", &(weight + 1.0)?)])?);
/// assert_eq!(one, one.to_string().parse()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

/// Tells this rule from later ones.
const RULE: &str = "v1:";

impl Fingerprint {
    /// Of the weights, `[out, in]`, of the adapted layers by path; their order is of no account.
    ///
    /// # Errors
    /// An [`Error::Module`] if a weight can't be read.
    pub fn of<'a>(weights: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> Result<Self> {
        let samples = weights.into_iter().map(|(path, weight)| {
            let sample =
                Sample::of(weight).map_err(|error| Error::module(path, error.to_string()))?;
            Ok((path, sample))
        });
        Ok(Self::of_samples(samples.collect::<Result<Vec<_>>>()?))
    }

    /// The same of samples that were taken one by one.
    pub(crate) fn of_samples(mut samples: Vec<(&str, Sample)>) -> Self {
        samples.sort_by_key(|(path, _)| *path);
        let mut hash = Sha256::new();
        for (path, Sample { shape, values }) in samples {
            // Lengths before contents: no two lists of weights give the same bytes.
            for number in [path.len(), shape.len()].iter().chain(&shape) {
                hash.update((*number as u64).to_le_bytes());
            }
            hash.update(path.as_bytes());
            for value in values {
                hash.update(value.to_bits().to_le_bytes());
            }
        }
        Self(hash.finalize().into())
    }
}

/// What of a weight counts.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    shape: Vec<usize>,
    values: Vec<half::bf16>,
}

impl Sample {
    /// Of a weight, `[out, in]`.
    pub fn of(weight: &Tensor) -> candle_core::Result<Self> {
        const ROWS: usize = 4;
        const COLUMNS: usize = 64;
        let (rows, columns) = weight.dims2()?;
        let mut values = Vec::new();
        for i in 0..ROWS.min(rows) {
            let row = i * (rows - 1) / (ROWS.min(rows) - 1).max(1);
            let numbers = weight
                .narrow(0, row, 1)?
                .narrow(1, 0, COLUMNS.min(columns))?;
            let numbers = numbers.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let numbers = numbers.to_dtype(DType::BF16)?.flatten_all()?;
            values.extend(numbers.to_vec1::<half::bf16>()?);
        }
        let shape = weight.dims().to_vec();
        Ok(Self { shape, values })
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(RULE)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let broken = || format!("{text:?} is no fingerprint of the kind {RULE}<64 hex digits>");
        let digits = text.strip_prefix(RULE).filter(|digits| digits.len() == 64);
        let digits = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let digits = digits.ok_or_else(broken)?;
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).map_err(|_| broken())?;
        }
        Ok(Self(bytes))
    }
}
