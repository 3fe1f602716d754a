//! A model with a hundred loaded adapters: the time of a switch from one to another, and the memory
//! that they take and give back.
//!
//! `cargo bench -p lora-core --bench switch`

use std::{alloc::System, error::Error, fs, hint::black_box, time::Instant};

use candle_core::{DType, Device, Module, Tensor};
use cap::Cap;
use lora_core::{LoraTargets, PeftConfig, Selection, nn::Linear};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const LAYERS: usize = 200;
const WIDTH: usize = 256;
const RANK: usize = 8;
const ADAPTERS: usize = 100;

#[derive(LoraTargets)]
struct Model {
    layers: Vec<Linear>,
}

impl Module for Model {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let mut layers = self.layers.iter();
        layers.try_fold(xs.clone(), |xs, layer| layer.forward(&xs)?.tanh())
    }
}

fn main() -> Result<()> {
    let dev = Device::Cpu;
    let layer = |_| {
        Ok(Linear::new(
            (Tensor::randn(0f32, 1.0, (WIDTH, WIDTH), &dev)? * 0.06)?,
            None,
        ))
    };
    let layers = (0..LAYERS).map(layer).collect::<Result<_>>()?;
    let mut model = Model { layers };
    let xs = Tensor::randn(0f32, 1.0, (1, WIDTH), &dev)?;
    let config = PeftConfig::all_linear().dim(RANK);
    // Once before, so that what threads keep for good does not count.
    model.add_adapter("first", &config)?;
    Selection::none().scope(|| model.forward(&xs))?;
    model.remove_adapters()?;

    let numbers = ADAPTERS * LAYERS * 2 * RANK * WIDTH;
    println!(
        "{ADAPTERS} adapters of rank {RANK} on {LAYERS} layers of {WIDTH} x {WIDTH}, f32: {:.0} MiB",
        (numbers * DType::F32.size_in_bytes()) as f64 / MIB,
    );
    let before = Memory::now()?;
    let names: Vec<String> = (0..ADAPTERS).map(|i| format!("adapter-{i}")).collect();
    for name in &names {
        model.add_adapter(name, &config)?;
    }
    let loaded = Memory::now()?;

    let adapters = model.adapters()?;
    let selections: Vec<Selection> = names
        .iter()
        .map(|name| adapters.select(&[name]))
        .collect::<Result<_, _>>()?;
    let by_handle = median(|i| Ok(adapters.set(&selections[i % ADAPTERS])?))?;
    let by_name = median(|i| Ok(adapters.set(&adapters.select(&[&names[i % ADAPTERS]])?)?))?;
    let by_scope = median(|i| {
        selections[i % ADAPTERS].scope(|| black_box(i));
        Ok(())
    })?;
    let of_the_model = median(|i| Ok(model.set_adapter(&names[i % ADAPTERS])?))?;
    println!("switch, median of {ROUNDS}:");
    println!("  Adapters::set           {by_handle:>8.2} µs");
    println!("  select and set by name  {by_name:>8.2} µs");
    println!("  entering a scope        {by_scope:>8.2} µs");
    println!("  set_adapter, traversing {of_the_model:>8.2} µs");

    // What a hundred adapters cost a forward pass with one of them.
    let many = median(|i| {
        adapters.set(&selections[i % ADAPTERS])?;
        model.forward(&xs)?;
        Ok(())
    })?;
    for name in &names[1..] {
        model.delete_adapter(name)?;
    }
    let one = median(|_| {
        model.forward(&xs)?;
        Ok(())
    })?;
    println!(
        "forward of one token: {many:.0} µs, switching among {ADAPTERS}; {one:.0} µs with one loaded"
    );
    model.remove_adapters()?;
    drop((adapters, selections));
    let after = Memory::now()?;
    for name in &names {
        model.add_adapter(name, &config)?;
    }
    let again = Memory::now()?;
    println!("memory, MiB       before    with   after drop   with others");
    for (name, of) in [
        ("allocated", Memory::allocated as fn(&Memory) -> f64),
        ("resident", Memory::resident),
    ] {
        println!(
            "  {name:<12} {:>10.1} {:>7.1} {:>12.1} {:>13.1}",
            of(&before),
            of(&loaded),
            of(&after),
            of(&again),
        );
    }
    Ok(())
}

const ROUNDS: usize = 1001;
const MIB: f64 = 1024.0 * 1024.0;

/// The median time of `run`, in microseconds.
fn median(mut run: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let mut times = Vec::with_capacity(ROUNDS);
    for i in 0..ROUNDS {
        let start = Instant::now();
        run(i)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

/// The memory of this process, in MiB.
struct Memory {
    allocated: f64,
    /// Zero where the system does not say.
    resident: f64,
}

impl Memory {
    fn now() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        Ok(Self {
            allocated: ALLOCATOR.allocated() as f64 / MIB,
            resident: kib.map_or(Ok(0.0), str::parse::<f64>)? / 1024.0,
        })
    }

    fn allocated(&self) -> f64 {
        self.allocated
    }

    fn resident(&self) -> f64 {
        self.resident
    }
}
