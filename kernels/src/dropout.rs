//! Dropout by counter: the mask is a function of (seed, site, step, element), never stored.
//!
//! Element `i = row * width + col` takes 16-bit draw `i % 8` of block `i / 8`. A block is Philox-4x32
//! with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11):
//! counter `(lo(block), hi(block), lo(step), hi(step))`, key `(lo(seed) ^ hi(seed), site)`, draws from
//! word 0 low half upwards. With `t = round(p * 65536)` an element is kept iff its draw is at least
//! `t`, and survivors are multiplied by `65536 / (65536 - t)`. The same on every device, tile and rank.

use cudarc::driver::DeviceRepr;

use crate::error::{Error, Result};

/// Where an element is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the input of the adapter: `D(x) Aᵀ Bᵀ`.
    Pre,
    /// On the output of the adapter: `D(x Aᵀ Bᵀ)`.
    Post,
}

/// Dropout of one layer at one step. Forward and backward of a step need the same value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    place: Place,
    mask: Mask,
}

/// The argument of the kernels, laid out as in `tile.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Mask {
    step: u64,
    seed: u32,
    site: u32,
    threshold: u32,
    scale: f32,
}

impl Mask {
    /// The same elements, and the scale of those that are kept for the caller to apply.
    pub fn split(self) -> (Self, f32) {
        let unscaled = Self { scale: 1.0, ..self };
        (unscaled, self.scale)
    }
}

// SAFETY: plain words in the layout of the kernels' struct `Dropout`.
unsafe impl DeviceRepr for Mask {}

impl Dropout {
    /// Dropout with probability `p`; `site` tells layers apart and `step` training steps.
    ///
    /// `p` below 2⁻¹⁷ is no dropout, and the result is then bit-identical to none.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `0 <= p < 1`.
    pub fn new(place: Place, p: f64, seed: u64, site: u32, step: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Probability(p));
        }
        let threshold = ((p * 65536.0).round() as u32).min(65535);
        let scale = (65536.0 / f64::from(65536 - threshold)) as f32;
        let seed = seed as u32 ^ (seed >> 32) as u32;
        Ok(Self {
            place,
            mask: Mask {
                step,
                seed,
                site,
                threshold,
                scale,
            },
        })
    }

    /// The factor of element `index`: zero or the scale of survivors.
    ///
    /// ```
    /// # use lora_kernels::{Dropout, Place};
    /// let dropout = Dropout::new(Place::Pre, 0.25, 1, 2, 3)?;
    /// let kept = (0..4096).filter(|&i| dropout.factor(i) > 0.0).count();
    /// assert!((2900..3250).contains(&kept)); // three in four
    /// # Ok::<(), lora_kernels::Error>(())
    /// ```
    pub fn factor(&self, index: u64) -> f32 {
        let words = philox(self.mask, index / 8);
        let draw = index % 8;
        let value = words[draw as usize / 2] >> (16 * (draw % 2)) & 0xffff;
        if value >= self.mask.threshold {
            self.mask.scale
        } else {
            0.0
        }
    }

    /// The mask to apply at `place`, or none where nothing is dropped there.
    pub(crate) fn at(dropout: Option<Self>, place: Place) -> Option<Mask> {
        dropout
            .filter(|d| d.place == place && d.mask.threshold > 0)
            .map(|d| d.mask)
    }
}

fn philox(mask: Mask, block: u64) -> [u32; 4] {
    let mut c = [
        block as u32,
        (block >> 32) as u32,
        mask.step as u32,
        (mask.step >> 32) as u32,
    ];
    let mut k = [mask.seed, mask.site];
    for _ in 0..7 {
        let first = 0xD251_1F53_u64 * u64::from(c[0]);
        let second = 0xCD9E_8D57_u64 * u64::from(c[2]);
        c = [
            (second >> 32) as u32 ^ c[1] ^ k[0],
            second as u32,
            (first >> 32) as u32 ^ c[3] ^ k[1],
            first as u32,
        ];
        k = [
            k[0].wrapping_add(0x9E37_79B9),
            k[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Random123's known answers for philox4x32 with 7 rounds: all zeros, all ones.
        let mask = |step, seed, site| Mask {
            step,
            seed,
            site,
            ..Mask::default()
        };
        assert_eq!(
            philox(mask(0, 0, 0), 0),
            [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]
        );
        assert_eq!(
            philox(mask(u64::MAX, u32::MAX, u32::MAX), u64::MAX),
            [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]
        );
    }

    #[test]
    fn survivors_keep_the_mean() -> Result<()> {
        for p in [0.1, 0.5, 0.9] {
            let dropout = Dropout::new(Place::Pre, p, 5, 6, 7)?;
            let mean = (0..1 << 16)
                .map(|i| f64::from(dropout.factor(i)))
                .sum::<f64>()
                / f64::from(1 << 16);
            assert!((mean - 1.0).abs() < 0.03, "p = {p}: {mean}");
        }
        assert!(Dropout::new(Place::Pre, 1.0, 0, 0, 0).is_err());
        assert_eq!(
            Dropout::at(Some(Dropout::new(Place::Pre, 0.0, 0, 0, 0)?), Place::Pre),
            None
        );
        Ok(())
    }
}
