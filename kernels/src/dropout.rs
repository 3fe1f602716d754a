//! Dropout by counter: the mask is a function of (seed, site, step, element), never stored.
//!
//! Two blocks of Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC'11) decide on 32 elements of a row: columns `128 u + 8 j + 2 t + c` with `j < 16`, `c < 2`, which one thread
//! of a quad has in the accumulators of tensor cores, are bits `j + 16 c` of word
//! `n = 4 (row * ceil(width / 128) + u) + t`. Blocks `b = 2 n` and `2 n + 1` have counter
//! `(lo(b), hi(b), lo(step), hi(step))` and key `(lo(seed) ^ hi(seed), site)`; their eight words are the bits,
//! lowest first, of a byte for every element. With `T = round(p * 2^32)` an element is dropped if its byte is less
//! than the upper byte of `T`, and, if it is equal, where `tie < T * 2^8 mod 2^32`, of which `tie` is the xor of words
//! `w` and `w + 4`, rotated left by `8 w` bits, for `w < 4`. Survivors are multiplied by `2^32 / (2^32 - T)`. The
//! same on every device, tile and rank.
//!
//! `tie` is independent of the bytes of any three elements: each is dropped with probability `T / 2^32`, and two
//! have a correlation of at most `2^-18 / (p (1 - p))`. Comparing 32 numbers with `T` costs one operation a bit.

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
    pub step: u64,
    pub seed: u32,
    pub site: u32,
    pub threshold: u32,
    pub scale: f32,
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
    /// `p` below 2⁻³³ is no dropout, and the result is then bit-identical to none.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `0 <= p < 1`.
    pub fn new(place: Place, p: f64, seed: u64, site: u32, step: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Probability(p));
        }
        let whole = 2f64.powi(32);
        let threshold = (p * whole).round() as u32;
        let scale = (whole / (whole - f64::from(threshold))) as f32;
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

    /// The factor of an element of a matrix with `width` columns: zero or the scale of survivors.
    ///
    /// ```
    /// # use lora_kernels::{Dropout, Place};
    /// let dropout = Dropout::new(Place::Pre, 0.25, 1, 2, 3)?;
    /// let kept = (0..4096).filter(|&column| dropout.factor(0, column, 4096) > 0.0).count();
    /// assert!((2900..3250).contains(&kept)); // three in four
    /// # Ok::<(), lora_kernels::Error>(())
    /// ```
    pub fn factor(&self, row: u64, column: usize, width: usize) -> f32 {
        let unit = row * width.div_ceil(128) as u64 + (column / 128) as u64;
        let word = kept_word(self.mask, 4 * unit + (column / 2 % 4) as u64);
        let bit = column / 8 % 16 + 16 * (column % 2);
        if word >> bit & 1 == 1 {
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

/// Word `number` of the mask: 1 for what is kept.
fn kept_word(mask: Mask, number: u64) -> u32 {
    let (lower, upper) = (philox(mask, 2 * number), philox(mask, 2 * number + 1));
    let tie = (0..4).fold(0, |tie, w| {
        tie ^ (lower[w] ^ upper[w]).rotate_left(8 * w as u32)
    });
    let equal = if tie < mask.threshold << 8 {
        0
    } else {
        u32::MAX
    };
    let bits = lower.into_iter().chain(upper).zip(24..);
    bits.fold(equal, |kept, (bits, place)| {
        if mask.threshold >> place & 1 == 1 {
            kept & bits
        } else {
            kept | bits
        }
    })
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
        // Where a byte alone would be wrong, too.
        for p in [0.001, 0.1, 0.5, 0.9, 0.999] {
            let dropout = Dropout::new(Place::Pre, p, 5, 6, 7)?;
            let (rows, width) = (1 << 12, 200);
            let factors = (0..rows * width).map(|i| {
                let (row, column) = (i / width, i % width);
                f64::from(dropout.factor(row as u64, column, width))
            });
            let count = (rows * width) as f64;
            let mean = factors.sum::<f64>() / count;
            let deviation = (p / (1.0 - p) / count).sqrt();
            assert!((mean - 1.0).abs() < 4.0 * deviation, "p = {p}: {mean}");
        }
        assert!(Dropout::new(Place::Pre, 1.0, 0, 0, 0).is_err());
        assert_eq!(
            Dropout::at(Some(Dropout::new(Place::Pre, 0.0, 0, 0, 0)?), Place::Pre),
            None
        );
        Ok(())
    }
}
