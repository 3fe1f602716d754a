//! One adapted layer on CUDA through candle's `backward()`: ours, and the composition of candle's
//! operations that a user would write, against the layer's floor, the two products of the frozen
//! layer. All run in turn; ratios are medians of those of neighbouring runs, by the wall clock.
//!
//! `cargo bench -p lora-core --features cuda --bench layer_cuda`

use std::time::Instant;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Module, Result, Shape, Tensor, Var,
};
use lora_core::{
    LinearLoRA, PeftConfig,
    nn::{Linear, forward_shared},
    patch_linear_module,
};
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

type Any<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Any<()> {
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
        println!("bf16 base, f32 adapters; the process keeps freed memory: {keep}");
        println!(
            "| tokens | in→out | r | path | floor ms | stock ms | ours ms | stock/floor | ours/floor \
             | stock/ours | stock MB | ours MB | x + y + dy + dx MB |"
        );
        println!("|--|--|--|--|--|--|--|--|--|--|--|--|--|");
        for shape in SHAPES {
            layer(&device, &pool, shape)?;
        }
        println!("three layers on one input, 8192 tokens, r = 16");
        println!(
            "| in→out | floor ms | alone ms | together ms | alone/floor | together/floor | alone MB | together MB |"
        );
        println!("|--|--|--|--|--|--|--|--|");
        for [inputs, outputs] in [[2048, 2048], [4096, 4096], [4096, 1024]] {
            layers(&device, &pool, inputs, outputs)?;
        }
    }
    Ok(())
}

fn normal(device: &Device, shape: (usize, usize), std: f32) -> Result<Tensor> {
    Tensor::randn(0f32, std, shape, device)?.to_dtype(DType::BF16)
}

/// One layer, ours and composed.
fn layer(
    device: &Device,
    pool: &MemoryPool,
    [tokens, inputs, outputs, rank]: [usize; 4],
) -> Any<()> {
    let weight = normal(device, (outputs, inputs), 0.02)?;
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
    let xs = Var::from_tensor(&normal(device, (tokens, inputs), 1.0)?)?;
    let dys = normal(device, (tokens, outputs), 1.0)?;
    let path = ours.compute_path(&xs)?;

    let floor = || products(&xs.as_detached_tensor(), &weight, &dys);
    let through = |layer: &dyn Module| -> Result<()> {
        let loss = layer
            .forward(xs.as_tensor())?
            .apply_op1(Probe(dys.clone()))?;
        drop(loss.backward()?);
        Ok(())
    };
    let runs = [&floor as Run, &|| through(&stock), &|| through(&ours)];
    let measured = measure(device, pool, runs)?;
    let [floor, stock, ours] = measured.medians();
    let [_, stock_mb, ours_mb] = measured.peaks.map(|bytes| bytes / 1_000_000);
    println!(
        "| {tokens} | {inputs}→{outputs} | {rank} | {path} | {floor:.2} | {stock:.2} | {ours:.2} \
         | {:.2} | {:.2} | {:.2} | {stock_mb} | {ours_mb} | {} |",
        measured.ratio(1, 0),
        measured.ratio(2, 0),
        measured.ratio(1, 2),
        2 * 2 * tokens * (inputs + outputs) / 1_000_000,
    );
    Ok(())
}

/// Three layers on one input, each by itself and together.
fn layers(device: &Device, pool: &MemoryPool, inputs: usize, outputs: usize) -> Any<()> {
    const TOKENS: usize = 8192;

    let config = PeftConfig::all_linear().dim(16).alpha(32.0).adapter()?;
    let mut layers = Vec::new();
    for i in 0..3 {
        let mut layer = Linear::new(normal(device, (outputs, inputs), 0.02)?, None);
        patch_linear_module(&format!("layers.{i}"), &mut layer, &config)?;
        layers.push(layer);
    }
    let xs = Var::from_tensor(&normal(device, (TOKENS, inputs), 1.0)?)?;
    let dys = normal(device, (TOKENS, outputs), 1.0)?;
    let floor = || {
        let xs = xs.as_detached_tensor();
        layers
            .iter()
            .try_for_each(|layer| products(&xs, layer.weight(), &dys))
    };
    let backward = |outputs: &[Tensor]| -> Result<()> {
        let probe = |ys: &Tensor| ys.apply_op1(Probe(dys.clone()));
        let losses = outputs.iter().map(probe).collect::<Result<Vec<_>>>()?;
        drop(Tensor::stack(&losses, 0)?.sum_all()?.backward()?);
        Ok(())
    };
    let alone = || {
        let forward = |layer: &Linear| layer.forward(xs.as_tensor());
        backward(&layers.iter().map(forward).collect::<Result<Vec<_>>>()?)
    };
    let together = || {
        backward(&forward_shared(
            [&layers[0], &layers[1], &layers[2]],
            xs.as_tensor(),
        )?)
    };
    let measured = measure(device, pool, [&floor, &alone, &together])?;
    let [floor, alone, together] = measured.medians();
    let [_, alone_mb, together_mb] = measured.peaks.map(|bytes| bytes / 1_000_000);
    println!(
        "| {inputs}→{outputs} | {floor:.2} | {alone:.2} | {together:.2} | {:.2} | {:.2} | {alone_mb} | {together_mb} |",
        measured.ratio(1, 0),
        measured.ratio(2, 0),
    );
    Ok(())
}

/// The two products of a frozen layer.
fn products(xs: &Tensor, weight: &Tensor, dys: &Tensor) -> Result<()> {
    drop((xs.matmul(&weight.t()?)?, dys.matmul(weight)?));
    Ok(())
}

type Run<'a> = &'a dyn Fn() -> Result<()>;

struct Measured {
    /// Milliseconds of each run.
    times: [Vec<f64>; 3],
    /// Bytes that each needed beyond what was there.
    peaks: [u64; 3],
}

impl Measured {
    fn medians(&self) -> [f64; 3] {
        [0, 1, 2].map(|i: usize| median(self.times[i].iter().copied()))
    }

    fn ratio(&self, i: usize, j: usize) -> f64 {
        median(self.times[i].iter().zip(&self.times[j]).map(|(a, b)| a / b))
    }
}

fn measure(device: &Device, pool: &MemoryPool, runs: [Run; 3]) -> Any<Measured> {
    const WARM_UP: usize = 3;

    let mut times = [const { Vec::new() }; 3];
    let mut peaks = [0; 3];
    for round in 0..ROUNDS + WARM_UP {
        for (i, run) in runs.iter().enumerate() {
            device.synchronize()?;
            pool.reset_peak()?;
            let before = pool.used()?;
            let start = Instant::now();
            run()?;
            device.synchronize()?;
            if round >= WARM_UP {
                times[i].push(start.elapsed().as_secs_f64() * 1e3);
                peaks[i] = pool.peak()? - before;
            }
        }
    }
    Ok(Measured { times, peaks })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
