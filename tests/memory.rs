//! What adapters take of memory, they give back. One test: the allocator counts the whole process.

use std::alloc::System;

use candle_core::{DType, Device, Module, Tensor};
use cap::Cap;
use lora_core::{LoraTargets, PeftConfig, nn::Linear};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

#[derive(LoraTargets)]
struct Model {
    layers: Vec<Linear>,
}

impl Model {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let mut layers = self.layers.iter();
        layers.try_fold(xs.clone(), |xs, layer| layer.forward(&xs))
    }
}

#[test]
fn a_hundred_adapters_leave_no_memory_behind() {
    const WIDTH: usize = 64;
    const RANK: usize = 4;
    const LAYERS: usize = 20;
    /// A hash table's room and the like.
    const SLACK: usize = 64 * 1024;

    let weight = || Tensor::zeros((WIDTH, WIDTH), DType::F32, &Device::Cpu).unwrap();
    let layers = (0..LAYERS).map(|_| Linear::new(weight(), None)).collect();
    let mut model = Model { layers };
    let config = PeftConfig::all_linear().dim(RANK);
    let xs = Tensor::ones((2, WIDTH), DType::F32, &Device::Cpu).unwrap();
    let name = |i: usize| format!("adapter-{i}");

    // Once before, so that threads and their buffers are there.
    model.add_adapter("first", &config).unwrap();
    model.forward(&xs).unwrap();
    model.merge_adapters(&["first"]).unwrap();
    model.unmerge().unwrap();
    let before = ALLOCATOR.allocated();
    let one = LAYERS * 2 * WIDTH * RANK * 4; // bytes
    for _ in 0..2 {
        for i in 0..100 {
            model.add_adapter(&name(i), &config).unwrap();
        }
        let full = ALLOCATOR.allocated();
        assert!(full - before > 100 * one, "{} bytes", full - before);
        let adapters = model.adapters().unwrap();
        for i in 0..100 {
            adapters.set(&adapters.select(&[name(i)]).unwrap()).unwrap();
            model.forward(&xs).unwrap();
        }
        assert!(
            ALLOCATOR.allocated() < full + SLACK,
            "a switch keeps nothing"
        );
        for i in 0..100 {
            model.delete_adapter(&name(i)).unwrap();
        }
        let after = ALLOCATOR.allocated();
        assert!(after < before + SLACK, "{} bytes are left", after - before);
    }

    // A swap in place takes none either, and removing all gives back the first too.
    let weights = model.export_adapter("first").unwrap();
    let adapted = ALLOCATOR.allocated();
    for _ in 0..3 {
        model.swap_adapter("first", &weights).unwrap();
    }
    assert!(ALLOCATOR.allocated() < adapted + 1024);
    drop(weights);
    model.merge_adapters(&["first"]).unwrap();
    model.remove_adapters().unwrap();
    let after = ALLOCATOR.allocated();
    assert!(after + one < before + one / 4, "{after} + {one} > {before}");
}
