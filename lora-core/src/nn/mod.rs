//! Layers and functions with the names and signatures of `candle_nn` that can be trained.

mod attention;
pub(crate) mod cpu;
mod cross_entropy;
mod embedding;
mod layer_norm;
mod linear;
mod norm;
mod rms_norm;
mod rotary;
mod shared;
mod softmax;
mod swiglu;
pub mod with_tracing;

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

pub use attention::causal_attention;
pub use candle_nn::LayerNormConfig;
pub use candle_nn::ops::silu;
pub use cross_entropy::{IGNORE_INDEX, causal_lm_loss, cross_entropy};
pub use embedding::{Embedding, embedding};
pub use layer_norm::{LayerNorm, layer_norm, layer_norm_no_bias};
pub use linear::{Linear, linear, linear_b, linear_no_bias};
pub use rms_norm::{RmsNorm, rms_norm};
pub use rotary::{rope, rope_i, rope_thd};
pub use shared::forward_shared;
pub use softmax::{softmax, softmax_last_dim};
pub use swiglu::swiglu;

/// The first of two names that `vb` has; the first name where it has neither, so that a builder
/// which makes its tensors can make it.
fn get_either(vb: &VarBuilder, size: usize, names: [&str; 2], init: Init) -> Result<Tensor> {
    let [first, second] = names;
    let name = match !vb.contains_tensor(first) && vb.contains_tensor(second) {
        true => second,
        false => first,
    };
    vb.get_with_hints(size, name, init)
}
