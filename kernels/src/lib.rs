//! CUDA kernels for a frozen linear with a LoRA adapter: forward and backward at nearly the cost of
//! the frozen linear alone.
//!
//! # Formulas
//! `x [tokens, in]`, `W [out, in]`, `A [rank, in]`, `B [out, rank]`, `s` the scaling, `D` dropout
//! (the same mask and scale wherever it stands), gradients `dY = dL/dy` and so on:
//! ```text
//! S  = s · D(x) Aᵀ                     dS = s · dY B
//! y  = x Wᵀ + b + S Bᵀ                 dx = dY W + D(dS A)
//!                                      dA = dSᵀ D(x)        dB = dYᵀ S
//! ```
//! That is [`Place::Pre`]; with [`Place::Post`] dropout stands on `S Bᵀ` instead, so `dS` and `dB`
//! read `D(dY)` and nothing else is masked. `W` and `b` get no gradient. Kept for backward: `x`
//! (the caller has it) and `S`. Dropout is recomputed from a counter, see [`Dropout`].
//!
//! # Layouts
//! All matrices are row-major with packed rows; `x` and `dY` may have a row stride larger than their
//! width ([`Rows`]), so views into larger buffers need no copy. Any size from 0 tokens on, any rank
//! from 1 on; offsets are 64 bits wide.
//!
//! # Dtypes
//! | base `T` | adapters and their gradients `P` | products | sums | paths |
//! |--|--|--|--|--|
//! | `bf16` | `f32` (masters) or `bf16` | bf16 tensor cores | f32 | Hopper, general |
//! | `f16` | `f32` (masters) or `f16` | f16 tensor cores | f32 | Hopper, general |
//! | `f32` | `f32` | f32 (base) and three tf32 parts (adapter), or tf32 by [`F32Math`] | f32 | general |
//!
//! # Paths
//! [`Kernels::forward_path`] and [`Kernels::backward_path`] tell which one a layer takes, and why not
//! the faster one.
//! - **Hopper** (compute capability 9.0): one persistent kernel (TMA and wgmma) makes the base product,
//!   adds bias and the adapter's part in the f32 sums and rounds once. Up to rank 64 `S` is made by that
//!   kernel's tiles, from the input that they read anyway and with its mask if there is one: the first tiles of a row
//!   take a share of the depth each. `dS` is made so, or in a pass before it, whichever is expected to cost less.
//!   Larger ranks, and both with dropout on the output, take the pass.
//!   Forward, a few tiles that would be left for a last wave are made by two or four times as many multiprocessors, a
//!   part of the depth each.
//!   In backward the pass reads `dY` for `dS` and `dB`, and then what nobody would have time for of `x`, for
//!   `dA`. Multiprocessors that the tiles of `dx` leave over make the rest of `dA`, and `dB` where no pass has,
//!   meanwhile, to the end where they have the time; the others help at the end where they do not.
//! - **Decode** (9.0, forward without dropout, of up to 64 tokens with a rank of at most 64, or up to 128 with at most 32
//!   where the layer is narrow enough to run at once): one launch for all of it, which reads `W` once and the adapter as it
//!   is kept.
//! - **General** (8.0 and newer): one-pass kernels write the adapter's part, and cuBLASLt adds the base
//!   product to it.
//!
//! All are deterministic: no float atomics, sums in a fixed order. cuBLASLt's algorithm is chosen by
//! timing at the first use of a large shape, so another process may round differently on the general
//! path.
//!
//! Kernels are compiled by NVRTC for the card found when they are first needed, and cached in
//! `$LORA_KERNELS_CACHE` or the user's cache folder. Building this crate needs neither a GPU nor a
//! CUDA toolkit; running it needs the driver, NVRTC and cuBLASLt.
//!
//! Tiles that use an `S` made by others wait for it, and parts of a tile for each other. As long as one stream of a device launches kernels of this
//! crate, it launches such kernels like any others. Where more do, where a stream records a graph and under the
//! Multi-Process Service, two of them might wait for multiprocessors that neither gives up: from then on the driver
//! starts all their blocks at once or none (a cooperative launch), which costs a few microseconds. The first launch of
//! a second stream awaits all that the device has to do. Before a graph is replayed beside the first stream, that
//! stream's work is to be awaited.
//!
//! From Hopper on a kernel starts while the one before it in the stream drains (programmatic
//! dependent launch), if both are of this crate; that needs no care of the caller.
//!
//! # Shared input
//! Linears that read the same `x` (q, k and v; gate and up) need one pass over it for all their `S`
//! and one for all their `dA`: [`Kernels::shrink_group`], then [`Kernels::forward_from`] for each;
//! [`Kernels::backward_from`] for each, then [`Kernels::outer_group`]. `S` and `dS` of a group are plain
//! matrices `[tokens, width]` by [`GroupLayout`].
//!
//! # Example
//! ```
//! use lora_kernels::{F32Math, InputGradient, Kernels, LoraLinear, Rows, first_device};
//!
//! let Some(context) = first_device() else { return Ok(()) }; // no GPU here
//! let (kernels, stream) = (Kernels::shared(&context)?, context.default_stream());
//! let (tokens, in_features, out_features, rank) = (3, 2, 2, 1);
//! let xs = stream.clone_htod(&[1_f32, 0., 0., 1., 1., 1.])?;
//! let weight = stream.clone_htod(&[1_f32, 2., 3., 4.])?;
//! let (a, b) = (stream.clone_htod(&[1_f32, 1.])?, stream.clone_htod(&[1_f32, -1.])?);
//! let linear = LoraLinear {
//!     weight: weight.as_view(),
//!     bias: None,
//!     a: a.as_view(),
//!     b: b.as_view(),
//!     in_features,
//!     out_features,
//!     rank,
//!     scaling: 0.5,
//!     dropout: None,
//!     math: F32Math::Exact,
//! };
//! let xs = Rows::packed(xs.as_view(), tokens, in_features);
//! let forward = kernels.forward(&stream, &xs, &linear)?;
//! assert_eq!(stream.clone_dtoh(&forward.ys)?, [1.5, 2.5, 2.5, 3.5, 4.0, 6.0]);
//!
//! let dys = stream.clone_htod(&[1_f32; 6])?;
//! let dys = Rows::packed(dys.as_view(), tokens, out_features);
//! let gradients = kernels.backward(&stream, &xs, &dys, &forward.saved, &linear, InputGradient::Wanted)?;
//! assert_eq!(stream.clone_dtoh(&gradients.b)?, [2.0, 2.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod backward;
mod check;
mod columns;
mod cubin;
mod decode;
mod dropout;
mod element;
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod emulator;
mod error;
mod flags;
mod forward;
mod gemm;
mod group;
mod hopper;
mod kernels;
mod launch;
mod linear;
mod low;
mod making;
mod masking;
mod memory;
mod pack;
mod path;
mod reduce;
mod rows;
mod shares;
mod shrink_ring;
mod side;
mod skinny;
mod streams;
mod sweep;
mod tail;
mod tensor_map;

pub use backward::{Gradients, InputGradient};
pub use check::compile_all;
pub use columns::{Columns, GroupLayout};
pub use dropout::{Dropout, Place};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use forward::{Forward, Saved};
pub use gemm::F32Math;
pub use group::{Grouped, Member};
pub use kernels::{Kernels, first_device};
pub use linear::{LoraLinear, Packed};
pub use memory::MemoryPool;
pub use path::{Path, Preference, Reason};
pub use rows::Rows;
