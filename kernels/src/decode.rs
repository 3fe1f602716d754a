//! Launcher of Hopper's kernel for few tokens: one launch for base product, bias and adapter.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use crate::element::{DType, Element};
use crate::error::Result;
use crate::kernels::{Instance, Kernel};
use crate::launch::{Grid, Launcher, arg};
use crate::linear::LoraLinear;
use crate::path::Preference;
use crate::rows::{Rows, padded_rank};

// As in decode.cu.
const CLUSTER: usize = 4;
const ROWS: usize = 32;
const THREADS: u32 = 256;
/// Tokens (padded) times ranks (padded) whose sums fit in shared memory.
const LARGEST_S: usize = 1024;
/// More tokens read the input too often: every block reads all of it.
const MOST_TOKENS: usize = 32;

/// Tokens as the kernel sees them: tiles of 8.
fn token_tiles(tokens: usize) -> usize {
    tokens.div_ceil(8).next_power_of_two()
}

impl Launcher<'_> {
    /// Whether [`Self::decode`] can run, and is expected to be fastest.
    pub fn decodes<T: Element, P: Element>(
        &self,
        xs: &Rows<T>,
        linear: &LoraLinear<T, P>,
        masked: bool,
    ) -> bool {
        let on_vectors = |address: u64| address.is_multiple_of(16);
        self.kernels.preference() == Preference::Fastest
            && self.kernels.arch() == "sm_90a"
            && T::DTYPE != DType::F32
            && !masked
            && (1..=MOST_TOKENS).contains(&xs.rows)
            && 8 * token_tiles(xs.rows) * padded_rank(linear.rank) <= LARGEST_S
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
        let instance = Instance {
            kernel: Kernel::Decode,
            defines: vec![
                ("DTYPE", T::DTYPE.define()),
                ("ALIGNED", 1),
                ("ADAPTER_F32", u32::from(P::DTYPE == DType::F32)),
                ("NT", token_tiles(xs.rows) as u32),
                ("RT", padded_rank(linear.rank) as u32),
            ],
        };
        let function = self.kernels.function(instance, 0)?;
        let (x_at, _x) = xs.data.device_ptr(self.stream);
        let (w_at, _w) = linear.weight.device_ptr(self.stream);
        let (a_at, _a) = linear.a.device_ptr(self.stream);
        let (b_at, _b) = linear.b.device_ptr(self.stream);
        let bias = linear.bias.as_ref().map(|b| b.device_ptr(self.stream));
        let bias_at = bias.as_ref().map_or(0, |(at, _)| *at);
        let (y_at, _y) = ys.device_ptr_mut(self.stream);
        let (s_at, _s) = s.device_ptr_mut(self.stream);
        let (tokens, ldx) = (xs.rows as i32, xs.stride as i64);
        let (rows, cols) = (linear.out_features as i32, linear.in_features as i32);
        let (rank, scale) = (linear.rank as i32, linear.scaling);
        let blocks = linear.out_features.div_ceil(ROWS).next_multiple_of(CLUSTER);
        let grid = Grid::new([blocks as u32, 1, 1], THREADS);
        let args = [
            arg(&x_at),
            arg(&w_at),
            arg(&bias_at),
            arg(&a_at),
            arg(&b_at),
            arg(&y_at),
            arg(&s_at),
            arg(&tokens),
            arg(&ldx),
            arg(&rows),
            arg(&cols),
            arg(&rank),
            arg(&scale),
        ];
        // SAFETY: arguments in the order of decode.cu; the layer and `xs` were checked, `ys` and `s`
        // have a row for every token, `s` of padded ranks.
        unsafe { self.launch("launch of decode", &function, grid, &args) }
    }
}
