//! Dropout by counter: a mask that is never stored.
//!
//! Of a row, the 128 columns from `128 u` on share four words of 32 bits, one bit an element: column
//! `8 j + 2 t + c` (`j < 16`, `t < 4`, `c < 2`) has bit `j + 16 c` of word `t`, which is number
//! `n = 4 (row · ⌈width / 128⌉ + u) + t` of the mask. It comes from the blocks `b = 2 n` and `2 n + 1`
//! of Philox-4x32-7, with
//!
//! ```text
//! counter = (low32(b), high32(b), low32(step), high32(step))
//! key     = (low32(seed) ^ high32(seed), site)
//! ```
//!
//! whose eight words are the bits, lowest first, of a byte for every element. With
//! `T = round(p · 2³²)` an element is dropped if its byte is less than the upper byte of `T`, and, of
//! those that are equal, where `tie < T · 2⁸ mod 2³²`: `tie` is the xor of words `w` and `w + 4`,
//! rotated left by `8 w` bits, for `w < 4`. What is kept is multiplied by `2³² / (2³² − T)`, so
//! that the expectation is exact. Forward, backward, CPU and GPU draw the same mask from these
//! numbers alone.
//!
//! So two blocks decide on 32 elements, a bit at a time for all of them at once. `tie` is independent of
//! the bytes of any three elements, hence each is dropped with probability `T / 2³²`, and the correlation
//! of two is at most `2⁻¹⁸ / (p (1 − p))`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, backend::BackendStorage, bail,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::philox::{halves, path_hash, philox};

/// Which side of the adapter dropout applies to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropoutPosition {
    /// On the adapter's input: `ys = xs Wᵀ + s · D(xs) Aᵀ Bᵀ` (PEFT's).
    Pre,
    /// On the adapter's output: `ys = xs Wᵀ + D(s · xs Aᵀ Bᵀ)` (NeMo AutoModel's default).
    #[default]
    Post,
}

/// The dropout of one adapter: its probability, and a counter of the masks drawn so far.
#[derive(Clone, Debug)]
pub(crate) struct Dropout {
    probability: f64,
    seed: u64,
    site: u32,
    /// Clones of a layer share it, so that no two forward passes draw the same mask.
    step: Arc<AtomicU64>,
}

impl Dropout {
    pub fn new(probability: f64, seed: u64, path: &str) -> Self {
        let [low, high] = halves(path_hash(path));
        Self {
            probability,
            seed,
            site: low ^ high,
            step: Arc::default(),
        }
    }

    pub fn probability(&self) -> f64 {
        self.probability
    }

    /// The same counter with another probability.
    pub fn with_probability(&self, probability: f64) -> Self {
        Self {
            probability,
            ..self.clone()
        }
    }

    /// The mask of the next forward pass; `None` if nothing is ever dropped.
    pub fn next(&self) -> Option<Mask> {
        let mask = self.peek()?;
        let step = self.step.fetch_add(1, Ordering::Relaxed);
        Some(Mask { step, ..mask })
    }

    /// What [`next`](Self::next) would give.
    pub fn peek(&self) -> Option<Mask> {
        let step = self.step.load(Ordering::Relaxed);
        Mask::new(self.probability, self.seed, self.site, step)
    }

    /// Makes `step` the number of the next mask.
    pub fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }
}

/// 2³², of which a threshold is a part.
const WHOLE: f64 = 4_294_967_296.0;

/// Columns whose bits stand in four words.
const UNIT: usize = 128;

/// A dropout mask over a matrix of any size, given by the numbers that it is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    threshold: u32,
    seed: u64,
    site: u32,
    step: u64,
}

impl Mask {
    /// The mask of the given numbers; `None` if `probability` rounds to zero of 2³².
    ///
    /// ```
    /// use lora_core::Mask;
    ///
    /// assert!(Mask::new(0.0, 1, 2, 3).is_none());
    /// let mask = Mask::new(0.25, 1, 2, 3).unwrap();
    /// let row: Vec<f32> = (0..1000).map(|column| mask.factor(0, column, 1000)).collect();
    /// assert!(row.iter().all(|factor| [0.0, 4.0 / 3.0].contains(factor)));
    /// assert!((700..800).contains(&row.iter().filter(|factor| **factor > 0.0).count()));
    /// ```
    pub fn new(probability: f64, seed: u64, site: u32, step: u64) -> Option<Self> {
        let threshold = (probability * WHOLE).round() as u32;
        (threshold > 0).then_some(Self {
            threshold,
            seed,
            site,
            step,
        })
    }

    /// `T`, the seed, the site and the step.
    #[cfg(feature = "cuda")]
    pub(crate) fn numbers(&self) -> (u32, u64, u32, u64) {
        (self.threshold, self.seed, self.site, self.step)
    }

    /// What an element of a matrix with `width` columns is multiplied by: 0, or `2³² / (2³² − T)`.
    pub fn factor(&self, row: u64, column: usize, width: usize) -> f32 {
        let unit = row * width.div_ceil(UNIT) as u64 + (column / UNIT) as u64;
        let word = self.word(4 * unit + (column / 2 % 4) as u64);
        if kept(word, column) {
            self.survivor()
        } else {
            0.0
        }
    }

    /// What is kept is multiplied by this.
    fn survivor(&self) -> f32 {
        (WHOLE / (WHOLE - f64::from(self.threshold))) as f32
    }

    /// Word `number` of the mask: a bit for each of 32 elements, set if it is kept.
    fn word(&self, number: u64) -> u32 {
        let ([low, high], [s0, s1]) = (halves(self.seed), halves(self.step));
        let block = |block| {
            let [b0, b1] = halves(block);
            philox::<7>([b0, b1, s0, s1], [low ^ high, self.site])
        };
        let (lower, upper) = (block(2 * number), block(2 * number + 1));
        let tie = (0..4).fold(0, |tie, w| {
            tie ^ (lower[w] ^ upper[w]).rotate_left(8 * w as u32)
        });
        // From the lowest bit on, a higher one outweighs those before.
        let equal = if tie < self.threshold << 8 {
            0
        } else {
            u32::MAX
        };
        let bits = lower.into_iter().chain(upper).zip(24..);
        bits.fold(equal, |kept, (bits, place)| {
            if self.threshold >> place & 1 == 1 {
                kept & bits
            } else {
                kept | bits
            }
        })
    }

    /// The factors of a matrix of this shape.
    pub(crate) fn tensor(
        &self,
        shape: &Shape,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let width = width(shape);
        let mut factors = vec![0f32; shape.elem_count()];
        self.for_each(&mut factors, width, |to, factor| *to = factor);
        Tensor::from_vec(factors, shape, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)
    }

    /// `xs` with the mask applied; on the CPU in one pass. Not differentiable.
    pub(crate) fn apply(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        if xs.device().is_cpu() && matches!(xs.dtype(), DType::F32 | DType::F64) {
            xs.contiguous()?.apply_op1_no_bwd(self)
        } else {
            xs.mul(&self.tensor(xs.shape(), xs.dtype(), xs.device())?)
        }
    }

    /// The factors of row `row` of a matrix with `width` columns.
    pub(crate) fn row(&self, row: u64, width: usize, mut scale: impl FnMut(usize, f32)) {
        let survivor = self.survivor();
        let first = row * width.div_ceil(UNIT) as u64;
        for (unit, start) in (first..).zip((0..width).step_by(UNIT)) {
            let words: [u32; 4] = std::array::from_fn(|t| self.word(4 * unit + t as u64));
            for column in start..width.min(start + UNIT) {
                let kept = kept(words[column / 2 % 4], column);
                scale(column, if kept { survivor } else { 0.0 });
            }
        }
    }

    /// Visits each value of a matrix with `width` columns, with its factor.
    fn for_each<T: Send>(
        &self,
        values: &mut [T],
        width: usize,
        scale: impl Fn(&mut T, f32) + Sync,
    ) {
        let rows = values.par_chunks_mut(width.max(1)).enumerate();
        rows.for_each(|(row, values)| {
            self.row(row as u64, width, |column, factor| {
                scale(&mut values[column], factor);
            });
        });
    }
}

/// Whether the word of a column keeps it.
fn kept(word: u32, column: usize) -> bool {
    word >> (column / 8 % 16 + 16 * (column % 2)) & 1 == 1
}

/// Columns of a matrix of any number of dimensions.
fn width(shape: &Shape) -> usize {
    shape.dims().last().copied().unwrap_or(1)
}

impl CustomOp1 for Mask {
    fn name(&self) -> &'static str {
        "dropout-mask"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("dropout-mask expects a contiguous tensor, got {layout:?}")
        };
        macro_rules! masked {
            ($values:expr, $variant:path, $float:ty) => {{
                let mut values = $values[start..end].to_vec();
                self.for_each(&mut values, width(layout.shape()), |value, factor| {
                    *value *= <$float>::from(factor);
                });
                $variant(values)
            }};
        }
        let masked = match storage {
            CpuStorage::F32(values) => masked!(values, CpuStorage::F32, f32),
            CpuStorage::F64(values) => masked!(values, CpuStorage::F64, f64),
            other => bail!("dropout-mask expects f32 or f64, got {:?}", other.dtype()),
        };
        Ok((masked, layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_have_the_factors_of_their_elements() -> candle_core::Result<()> {
        let mask = Mask::new(0.3, 1, 2, 3).unwrap();
        for width in [1, 130, 300] {
            let shape = Shape::from((3, 2, width));
            let all = mask.tensor(&shape, DType::F32, &Device::Cpu)?;
            let ones = Tensor::ones(shape, DType::F32, &Device::Cpu)?;
            let applied = mask.apply(&ones)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(applied, all.flatten_all()?.to_vec1::<f32>()?);
            for (i, factor) in applied.into_iter().enumerate() {
                let row = (i / width) as u64;
                assert_eq!(factor, mask.factor(row, i % width, width));
            }
        }
        Ok(())
    }
}
