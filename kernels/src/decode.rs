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
const OWN_ROWS: usize = 32;
const DEPTH: usize = 64;
const MOST_STAGES: usize = 10;
/// Shared memory that blocks of a multiprocessor may have.
const SHARED_BYTES: usize = 226 << 10;
const MOST_TOKENS: usize = 64;
/// Beyond these ranks, and this many tokens (padded) times ranks (padded), the general path is as fast.
const MOST_RANKS: usize = 64;
const LARGEST_S: usize = 1024;

/// Tokens as the kernel sees them: tiles of 8.
fn token_tiles(tokens: usize) -> usize {
    match tokens {
        ..=8 => 1,
        9..=16 => 2,
        _ => MOST_TOKENS / 8,
    }
}

/// Blocks of a cluster.
fn cluster(tiles: usize) -> usize {
    if tiles <= 2 { 4 } else { 2 }
}

/// Blocks of a launch.
fn blocks(tiles: usize, out_features: usize) -> usize {
    let cluster = cluster(tiles);
    cluster * out_features.div_ceil(cluster * OWN_ROWS)
}

/// Stages of the ring, and bytes of dynamic shared memory.
///
/// Clusters of four blocks do not find as many places as there are multiprocessors, so two of their blocks
/// are to fit one.
fn ring<P: Element>(tiles: usize, ranks: usize) -> (usize, usize) {
    let (tokens, cluster) = (8 * tiles, cluster(tiles));
    let rows = cluster * OWN_ROWS;
    let stage = DEPTH * (2 * (rows + tokens) + size_of::<P>() * ranks);
    let fixed = 4 * (ranks * tokens + (ranks + 1) * (OWN_ROWS + 1)) + 16 * MOST_STAGES;
    let bytes = if cluster == 4 {
        SHARED_BYTES / 2
    } else {
        SHARED_BYTES
    };
    let stages = ((bytes - fixed) / stage).min(MOST_STAGES);
    let sums = 4 * tokens * (cluster * (OWN_ROWS + 4) + (cluster + rows / 16) * ranks);
    (stages, sums.max(stages * stage))
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
        // Blocks that have a multiprocessor each and must wait for one are slower than a library's product.
        let at_once = cluster(tiles) == 4
            || blocks(tiles, linear.out_features) <= self.kernels.multiprocessors();
        let on_vectors = |address: u64| address.is_multiple_of(16);
        self.kernels.preference() == Preference::Fastest
            && self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && !masked
            && (1..=MOST_TOKENS).contains(&xs.rows)
            && at_once
            && linear.rank <= MOST_RANKS
            && 8 * tiles * padded_rank(linear.rank) <= LARGEST_S
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
        let cluster = cluster(tiles);
        let (stages, shared_bytes) = ring::<P>(tiles, ranks);
        let function = self.kernels.function(instance, shared_bytes)?;
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
        let w_map = TensorMap::new::<T>(
            w_at,
            (out_features, in_features, in_features),
            cluster * OWN_ROWS,
        )?;
        let a_map = TensorMap::new::<P>(a_at, (linear.rank, in_features, in_features), ranks)?;
        let (tokens, rank, scale) = (xs.rows as i32, linear.rank as i32, linear.scaling);
        let (rows, cols) = (out_features as i32, in_features as i32);
        let stages = stages as i32;
        let blocks = blocks(tiles, out_features);
        let threads = 32 * (2 * cluster + 1); // a warp for 16 rows, and one that loads
        let grid = Grid {
            shared_bytes,
            ..Grid::new([blocks as u32, 1, 1], threads as u32)
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
                if 8 * tiles * ranks > LARGEST_S {
                    continue;
                }
                for (stages, bytes) in [ring::<f32>(tiles, ranks), ring::<bf16>(tiles, ranks)] {
                    assert!((2..=MOST_STAGES).contains(&stages), "{stages} stages");
                    let room = SHARED_BYTES * 2 / cluster(tiles);
                    assert!(bytes <= room, "{bytes} bytes of {room}");
                }
            }
        }
    }
}
