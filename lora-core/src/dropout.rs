//! Dropout by counter: a mask that is never stored.
//!
//! Element `(row, column)` of a matrix with `width` columns has the index
//! `i = row · width + column`. Block `i / 8` of Philox-4x32-7, with
//!
//! ```text
//! counter = (low32(i / 8), high32(i / 8), low32(step), high32(step))
//! key     = (low32(seed) ^ high32(seed), site)
//! ```
//!
//! gives eight 16-bit draws: the low half of word 0, its high half, the low half of word 1, and
//! so on; the element takes draw `i % 8`. It is kept if the draw is at least
//! `t = round(p · 65536)`, and then multiplied by `65536 / (65536 − t)`, so that the expectation
//! is exact. Forward, backward, CPU and GPU draw the same mask from these numbers alone.

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

/// A dropout mask over a matrix of any size, given by the numbers that it is drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    threshold: u16,
    seed: u64,
    site: u32,
    step: u64,
}

impl Mask {
    /// The mask of the given numbers; `None` if `probability` rounds to zero of 65536.
    ///
    /// ```
    /// use lora_core::Mask;
    ///
    /// assert!(Mask::new(0.0, 1, 2, 3).is_none());
    /// let mask = Mask::new(0.25, 1, 2, 3).unwrap();
    /// let kept = (0..1000).filter(|&i| mask.factor(i) > 0.0).count();
    /// assert!((700..800).contains(&kept));
    /// assert_eq!(mask.factor(0).max(mask.factor(1)), 4.0 / 3.0);
    /// ```
    pub fn new(probability: f64, seed: u64, site: u32, step: u64) -> Option<Self> {
        let threshold = (probability * 65536.0).round().clamp(0.0, 65535.0) as u16;
        (threshold > 0).then_some(Self {
            threshold,
            seed,
            site,
            step,
        })
    }

    /// `t`, the seed, the site and the step.
    #[cfg(feature = "cuda")]
    pub(crate) fn numbers(&self) -> (u16, u64, u32, u64) {
        (self.threshold, self.seed, self.site, self.step)
    }

    /// What element `index` is multiplied by: 0, or `65536 / (65536 − t)`.
    pub fn factor(&self, index: u64) -> f32 {
        self.block(index / 8)[(index % 8) as usize]
    }

    /// The factors of the elements `8 · block ..`.
    fn block(&self, block: u64) -> [f32; 8] {
        let ([b0, b1], [s0, s1]) = (halves(block), halves(self.step));
        let [low, high] = halves(self.seed);
        let words = philox::<7>([b0, b1, s0, s1], [low ^ high, self.site]);
        let survivor = 65536.0 / (65536.0 - f32::from(self.threshold));
        std::array::from_fn(|i| {
            let draw = (words[i / 2] >> (16 * (i % 2))) as u16;
            if draw < self.threshold { 0.0 } else { survivor }
        })
    }

    /// The factors of a matrix of this shape.
    pub(crate) fn tensor(
        &self,
        shape: &Shape,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let count = shape.elem_count();
        let mut factors = (0..count.div_ceil(8) as u64)
            .into_par_iter()
            .flat_map_iter(|block| self.block(block))
            .collect::<Vec<f32>>();
        factors.truncate(count);
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

    /// Multiplies the elements `start ..` of a matrix by their factors.
    pub(crate) fn for_each(&self, start: u64, len: usize, mut scale: impl FnMut(usize, f32)) {
        let mut done = 0;
        while done < len {
            let index = start + done as u64;
            let factors = self.block(index / 8);
            for factor in &factors[(index % 8) as usize..] {
                if done < len {
                    scale(done, *factor);
                    done += 1;
                }
            }
        }
    }
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
        /// Elements a thread handles at once: many blocks, and a multiple of their width.
        const CHUNK: usize = 8 * 1024;

        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("dropout-mask expects a contiguous tensor, got {layout:?}")
        };
        macro_rules! masked {
            ($values:expr, $variant:path, $float:ty) => {{
                let mut values = $values[start..end].to_vec();
                values
                    .par_chunks_mut(CHUNK)
                    .enumerate()
                    .for_each(|(chunk, values)| {
                        let len = values.len();
                        self.for_each((chunk * CHUNK) as u64, len, |i, factor| {
                            values[i] *= <$float>::from(factor);
                        });
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
