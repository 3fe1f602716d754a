//! Linear layers that read the same input.

use candle_core::{Module, Result, Tensor, bail};

use super::Linear;
use crate::{
    linear_lora::Sharing,
    op::shared::{self, Member},
};

/// The outputs of several layers for one input: q, k and v of attention, gate and up of an MLP.
///
/// It computes what calling each layer computes. Adapted layers are cheaper together: the input is
/// read once for all their `A`, once for the gradients of all of them, and kept once for the
/// backward pass. Each layer keeps its own adapter, under its own name on disk. Layers that are
/// plain or merged, or whose dropout is on the input, run by themselves.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use lora_core::{PeftConfig, nn::{Linear, forward_shared}, patch_linear_module};
///
/// let xs = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let adapter = PeftConfig::all_linear().dim(4).adapter()?;
/// let layer = |path: &str, width: usize| -> lora_core::Result<Linear> {
///     let weight = Tensor::randn(0f32, 1.0, (width, 8), &Device::Cpu)?;
///     let mut layer = Linear::new(weight, None);
///     patch_linear_module(path, &mut layer, &adapter)?;
///     Ok(layer)
/// };
/// let (q, k, v) = (layer("q_proj", 8)?, layer("k_proj", 4)?, layer("v_proj", 4)?);
/// let [qs, ks, _] = forward_shared([&q, &k, &v], &xs)?;
/// assert_eq!(qs.to_vec3::<f32>()?, q.forward(&xs)?.to_vec3::<f32>()?);
/// assert_eq!(ks.dims(), [2, 5, 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of the layers.
pub fn forward_shared<const N: usize>(layers: [&Linear; N], xs: &Tensor) -> Result<[Tensor; N]> {
    let mut sharing = Vec::with_capacity(N);
    for layer in layers {
        sharing.push(layer.sharing(xs)?);
    }
    let mut outputs = Vec::with_capacity(N);
    if sharing.iter().flatten().count() < 2 {
        for layer in layers {
            outputs.push(layer.forward(xs)?);
        }
    } else {
        for layer in sharing.iter().flatten() {
            layer.check_input(xs)?;
        }
        let members: Vec<Member> = sharing.iter().flatten().map(Sharing::member).collect();
        let mut together = shared::apply(xs, &members)?.into_iter();
        for (layer, sharing) in layers.into_iter().zip(sharing) {
            outputs.push(match sharing.and_then(|_| together.next()) {
                Some(ys) => ys,
                None => layer.forward(xs)?,
            });
        }
    }
    match outputs.try_into() {
        Ok(outputs) => Ok(outputs),
        Err(_) => bail!("forward_shared: one output a layer"),
    }
}
