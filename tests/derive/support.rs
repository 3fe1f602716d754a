//! Layers to build models of, and what a traversal of a model meets.

use candle_core::{DType, Device, Tensor};
use lora_core::{LoraTargets, nn::Linear};

/// A small layer; these tests ask where it is, not what it computes.
pub fn linear() -> Linear {
    let weight = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).expect("a tensor of 16 bytes");
    Linear::new(weight, None)
}

/// The paths of all linear layers, in the order of the visits.
pub fn visited<M: LoraTargets + ?Sized>(model: &mut M) -> Vec<String> {
    visited_with_heads(model)
        .into_iter()
        .map(|(path, _)| path)
        .collect()
}

/// The same, with whether each is part of the output head.
pub fn visited_with_heads<M: LoraTargets + ?Sized>(model: &mut M) -> Vec<(String, bool)> {
    let mut paths = Vec::new();
    model
        .for_each_linear(&mut |path, _| {
            paths.push((path.to_string(), path.is_head()));
            Ok(())
        })
        .expect("no visit fails");
    paths
}

/// Checks what a traversal of a model visits, in order.
macro_rules! assert_visits {
    ($model:expr, [$($path:literal),* $(,)?] $(,)?) => {
        assert_eq!(
            $crate::support::visited(&mut $model),
            Vec::<String>::from([$($path.to_string()),*]),
        )
    };
}
