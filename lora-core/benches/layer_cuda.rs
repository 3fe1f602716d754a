//! One adapted layer on CUDA through candle's `backward()`: ours, and the composition of candle's
//! operations that a user would write, against the layer's floor, the two products of the frozen
//! layer. All run in turn; ratios are medians of those of neighbouring runs, by the wall clock.
//!
//! `cargo bench -p lora-core --features cuda --bench layer_cuda`

use std::time::Instant;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Module, Result, Shape, Tensor, Var,
};
use lora_core::{LinearLoRA, PeftConfig};
use lora_kernels::MemoryPool;

const ROUNDS: usize = 20;
/// tokens, in, out, rank
const SHAPES: [[usize; 4]; 5] = [
    [8192, 4096, 4096, 16],
    [8192, 4096, 14336, 16],
    [8192, 14336, 4096, 16],
    [8192, 4096, 4096, 64],
    [2048, 4096, 4096, 16],
];

/// A loss that costs nothing: its gradient is given.
struct Probe(Tensor);

impl CustomOp1 for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("the benchmark runs on CUDA")
    }

    fn cuda_fwd(&self, ys: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let zero = ys.device.alloc_zeros::<half::bf16>(1)?;
        let zero = CudaStorage::wrap_cuda_slice(zero, ys.device.clone());
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The stock way.
struct Composed {
    base: candle_nn::Linear,
    a: Var,
    b: Var,
    scaling: f64,
}

impl Module for Composed {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let a = self.a.to_dtype(xs.dtype())?;
        let b = self.b.to_dtype(xs.dtype())?;
        let delta = xs.matmul(&a.t()?)?.matmul(&b.t()?)?;
        self.base.forward(xs)? + (delta * self.scaling)?
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device here");
        return Ok(());
    };
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let pool = MemoryPool::of(&context)?;
    for keep in [false, true] {
        if keep {
            pool.keep_freed(u64::MAX)?;
        }
        println!("bf16 base, f32 adapters, freed memory kept by the process: {keep}");
        println!(
            "| tokens | in→out | r | path | floor ms | stock ms | ours ms | stock/floor | ours/floor \
             | stock/ours | stock MB | ours MB | x + y + dy + dx MB |"
        );
        println!("|--|--|--|--|--|--|--|--|--|--|--|--|--|");
        for shape in SHAPES {
            row(&device, &pool, shape)?;
        }
    }
    Ok(())
}

fn row(
    device: &Device,
    pool: &MemoryPool,
    [tokens, inputs, outputs, rank]: [usize; 4],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let normal = |shape: (usize, usize), std: f32| {
        Tensor::randn(0f32, std, shape, device)?.to_dtype(DType::BF16)
    };
    let weight = normal((outputs, inputs), 0.02)?;
    let config = PeftConfig::all_linear().dim(rank).alpha(2.0 * rank as f64);
    let ours = LinearLoRA::new("layer", weight.clone(), None, &config.adapter()?)?;
    ours.lora_b()
        .set(&Tensor::randn(0f32, 0.1, (outputs, rank), device)?)?;
    let stock = Composed {
        base: candle_nn::Linear::new(weight.clone(), None),
        a: Var::from_tensor(ours.lora_a())?,
        b: Var::from_tensor(ours.lora_b())?,
        scaling: ours.scaling(),
    };
    let xs = Var::from_tensor(&normal((tokens, inputs), 1.0)?)?;
    let dys = normal((tokens, outputs), 1.0)?;
    let path = ours.compute_path(&xs)?;

    let floor = || -> Result<()> {
        let xs = xs.as_detached_tensor();
        let ys = xs.matmul(&weight.t()?)?;
        let dxs = dys.matmul(&weight)?;
        drop((ys, dxs));
        Ok(())
    };
    let through = |layer: &dyn Module| -> Result<()> {
        let loss = layer
            .forward(xs.as_tensor())?
            .apply_op1(Probe(dys.clone()))?;
        drop(loss.backward()?);
        Ok(())
    };
    let runs: [&dyn Fn() -> Result<()>; 3] = [&floor, &|| through(&stock), &|| through(&ours)];
    let mut times = [const { Vec::new() }; 3];
    let mut peaks = [0; 3];
    for round in 0..ROUNDS + 3 {
        for (i, run) in runs.iter().enumerate() {
            device.synchronize()?;
            pool.reset_peak()?;
            let before = pool.used()?;
            let start = Instant::now();
            run()?;
            device.synchronize()?;
            if round >= 3 {
                times[i].push(start.elapsed().as_secs_f64() * 1e3);
                peaks[i] = pool.peak()? - before;
            }
        }
    }
    let ratio = |i: usize, j: usize| median(times[i].iter().zip(&times[j]).map(|(a, b)| a / b));
    let [floor, stock, ours] = [0, 1, 2].map(|i: usize| median(times[i].iter().copied()));
    let mb = |bytes: u64| bytes / 1_000_000;
    println!(
        "| {tokens} | {inputs}→{outputs} | {rank} | {path} | {floor:.2} | {stock:.2} | {ours:.2} | {:.2} | {:.2} | {:.2} \
         | {} | {} | {} |",
        ratio(1, 0),
        ratio(2, 0),
        ratio(1, 2),
        mb(peaks[1]),
        mb(peaks[2]),
        2 * 2 * tokens * (inputs + outputs) / 1_000_000,
    );
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
