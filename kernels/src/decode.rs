//! Launcher of Hopper's kernel for few tokens: one launch for base product, bias and adapter.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg};
use crate::linear::LoraLinear;
use crate::path::Preference;
use crate::rows::{Rows, padded_rank};
use crate::tensor_map::TensorMap;

// As in decode.cu.
const CLUSTER: usize = 2;
const ROWS: usize = 64;
const THREADS: u32 = 160;
const DEPTH: usize = 64;
const MOST_STAGES: usize = 10;
/// Shared memory that blocks of a multiprocessor may have.
pub(crate) const SHARED_BYTES: usize = 226 << 10;
const MOST_TOKENS: usize = 128;
const MOST_RANKS: usize = 64;
/// Most tokens (padded) times ranks (padded), by the registers that a thread has for S.
const LARGEST_S: usize = 4096;
/// Most tokens (padded) times ranks (padded) by which two blocks of a multiprocessor have enough registers.
const LARGEST_S_OF_TWO: usize = 2048;

/// Tokens as the kernel sees them: tiles of 8.
pub(crate) fn token_tiles(tokens: usize) -> usize {
    tokens.div_ceil(8).next_power_of_two()
}

/// Whether the kernel takes so many tiles and padded ranks: a thread has registers for no larger S.
pub(crate) fn fits(tiles: usize, ranks: usize) -> bool {
    8 * tiles <= MOST_TOKENS && ranks <= MOST_RANKS && 8 * tiles * ranks <= LARGEST_S
}

/// Blocks of a launch.
fn blocks(out_features: usize) -> usize {
    CLUSTER * out_features.div_ceil(ROWS)
}

/// Bytes of shared memory that a block may have: all, or where `several` are to run on a multiprocessor, half, so that two
/// do at once, if there are registers for two.
fn room(tiles: usize, ranks: usize, several: bool) -> usize {
    if several && 8 * tiles * ranks <= LARGEST_S_OF_TWO {
        SHARED_BYTES / 2
    } else {
        SHARED_BYTES
    }
}

/// Elements of S, which comes in tiles of 16 tokens.
fn elements_of_s(tiles: usize, ranks: usize) -> usize {
    ranks * (8 * tiles).next_multiple_of(16)
}

/// Bytes of static shared memory of a block: barriers, and what comes from the other one of its cluster, half of its sums and
/// S.
fn static_bytes(tiles: usize, ranks: usize) -> usize {
    let sums = ROWS * (8 * tiles).next_multiple_of(16) / CLUSTER;
    16 * MOST_STAGES + 4 * (sums + elements_of_s(tiles, ranks))
}

/// Stages of the ring, and bytes of dynamic shared memory, of a block that has `room`.
pub(crate) fn ring<P: Element>(tiles: usize, ranks: usize, room: usize) -> (usize, usize) {
    let stage = DEPTH * (2 * (ROWS + 8 * tiles) + size_of::<P>() * ranks);
    let stages = ((room - static_bytes(tiles, ranks)) / stage).min(MOST_STAGES);
    // In the end S of each warp stands there, in f32, and of all in halves.
    let s = (4 * ROWS / 16 + 2) * elements_of_s(tiles, ranks);
    (stages, s.max(stages * stage))
}

impl Launcher<'_> {
    /// Whether [`Self::decode`] can run, and is expected to be fastest.
    pub fn decodes<T: Element, P: Element>(
        &self,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
        masked: bool,
    ) -> bool {
        let tiles = token_tiles(xs.rows);
        // For many tokens a library's product is faster where blocks come in several waves.
        let at_once = blocks(linear.out_features) <= self.kernels.multiprocessors();
        let on_vectors = |address: u64| address.is_multiple_of(16);
        self.kernels.preference() == Preference::Fastest
            && self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && !masked
            && xs.rows > 0
            && (tiles <= 8 || at_once)
            && fits(tiles, padded_rank(linear.rank))
            && self.aligned(xs)
            && on_vectors(self.address(&linear.weight))
            && on_vectors(self.address(&linear.a))
    }

    /// `ys = x Wᵀ + b + S Bᵀ`, and `s = s · x Aᵀ` `[tokens, padded_rank]`. [`Self::decodes`] must hold.
    pub fn decode<T: Element, P: Element>(
        &self,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
        (ys, s): (&mut CudaSlice<T>, &mut CudaSlice<T>),
    ) -> Result<()> {
        let (tiles, ranks) = (token_tiles(xs.rows), padded_rank(linear.rank));
        let instance = Instance {
            kernel: Kernel::Decode,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("ADAPTER_F32", u32::from(P::DTYPE == DType::F32)),
                ("NT", tiles as u32),
                ("RT", ranks as u32),
            ],
        };
        let blocks = blocks(linear.out_features);
        let several = blocks > self.kernels.multiprocessors();
        let (stages, shared_bytes) = ring::<P>(tiles, ranks, room(tiles, ranks, several));
        let most_bytes = ring::<P>(tiles, ranks, SHARED_BYTES).1;
        let function = self.kernels.function(instance, most_bytes)?;
        let (x_at, _x) = xs.data.device_ptr(self.stream);
        let (w_at, _w) = linear.weight.device_ptr(self.stream);
        let (a_at, _a) = linear.a.device_ptr(self.stream);
        let (b_at, _b) = linear.b.device_ptr(self.stream);
        let bias = linear.bias.as_ref().map(|b| b.device_ptr(self.stream));
        let bias_at = bias.as_ref().map_or(0, |(at, _)| *at);
        let (y_at, _y) = ys.device_ptr_mut(self.stream);
        let (s_at, _s) = s.device_ptr_mut(self.stream);
        let (out_features, in_features) = (linear.out_features, linear.in_features);
        let x_map = TensorMap::new::<T>(x_at, (xs.rows, in_features, xs.stride), 8 * tiles)?;
        let w_map = TensorMap::new::<T>(w_at, (out_features, in_features, in_features), ROWS)?;
        let a_map = TensorMap::new::<P>(a_at, (linear.rank, in_features, in_features), ranks)?;
        let (tokens, rank, scale) = (xs.rows as i32, linear.rank as i32, linear.scaling);
        let (rows, cols) = (out_features as i32, in_features as i32);
        let stages = stages as i32;
        let grid = Grid {
            shared_bytes,
            ..Grid::new([blocks as u32, 1, 1], THREADS)
        };
        let args = [
            arg(&x_map),
            arg(&w_map),
            arg(&a_map),
            arg(&bias_at),
            arg(&b_at),
            arg(&y_at),
            arg(&s_at),
            arg(&tokens),
            arg(&rows),
            arg(&cols),
            arg(&rank),
            arg(&scale),
            arg(&stages),
        ];
        // SAFETY: arguments in the order of decode.cu; the maps clip loads to `xs` and the weight, which
        // were checked; `ys` and `s` have a row for every token, `s` of padded ranks.
        unsafe { self.launch("launch of decode", &function, grid, &args) }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn tiles_hold_the_tokens_and_rings_fit() {
        for tokens in 1..=MOST_TOKENS {
            let tiles = token_tiles(tokens);
            assert!(tokens <= 8 * tiles, "{tokens} tokens in {tiles} tiles");
            for ranks in [16, 32, 64].map(padded_rank) {
                if !fits(tiles, ranks) {
                    continue;
                }
                for room in [SHARED_BYTES, room(tiles, ranks, true)] {
                    for (stages, bytes) in [
                        ring::<f32>(tiles, ranks, room),
                        ring::<bf16>(tiles, ranks, room),
                    ] {
                        assert!((2..=MOST_STAGES).contains(&stages), "{stages} stages");
                        let bytes = bytes + static_bytes(tiles, ranks);
                        assert!(bytes <= room, "{bytes} bytes of {room}");
                    }
                }
            }
        }
    }
}
