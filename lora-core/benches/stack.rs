//! Backward pass of a stack of adapted layers: ours against `candle_nn::Linear` with an adapter
//! composed of candle's operations. The two run in turn; ratios are of pairs.
//!
//! `cargo bench -p lora-core --bench stack`

use std::time::{Duration, Instant};

use candle_core::{Device, Module, Result, Tensor, Var, backprop::GradStore};
use lora_core::{LinearLoRA, PeftConfig};

const LAYERS: usize = 8;
const WIDTH: usize = 512;
const RANK: usize = 8;
const ROUNDS: usize = 21;

/// The stock way: the base's product and the adapter's, as a user composes them.
struct Composed {
    base: candle_nn::Linear,
    a: Var,
    b: Var,
    scaling: f64,
}

impl Module for Composed {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let delta = xs.matmul(&self.a.t()?)?.matmul(&self.b.t()?)?;
        self.base.forward(xs)? + (delta * self.scaling)?
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let dev = Device::Cpu;
    println!(
        "{LAYERS} layers of {WIDTH} x {WIDTH}, rank {RANK}, f32, {} threads",
        rayon::current_num_threads()
    );
    println!("tokens  stock ms  ours ms  stock/ours  stock gradients kept  ours");
    for tokens in [64, 128, 256, 1024] {
        let config = PeftConfig::all_linear().dim(RANK).alpha(16.0).adapter()?;
        let mut stock = Vec::new();
        let mut ours = Vec::new();
        for layer in 0..LAYERS {
            let weight = (Tensor::randn(0f32, 1.0, (WIDTH, WIDTH), &dev)? * 0.04)?;
            let lora = LinearLoRA::new(&format!("layers.{layer}"), weight.clone(), None, &config)?;
            let b = Tensor::randn(0f32, 0.1, (WIDTH, RANK), &dev)?;
            lora.lora_b().set(&b)?;
            stock.push(Composed {
                base: candle_nn::Linear::new(weight, None),
                a: Var::from_tensor(lora.lora_a())?,
                b: Var::from_tensor(&b)?,
                scaling: lora.scaling(),
            });
            ours.push(lora);
        }
        let xs = Tensor::randn(0f32, 1.0, (tokens, WIDTH), &dev)?;
        let mut times = Vec::new();
        let mut kept = (0, 0);
        for round in 0..=ROUNDS {
            let (stock_time, stock_grads) = backward(&stock, &xs)?;
            let (our_time, our_grads) = backward(&ours, &xs)?;
            kept = (elements(&stock_grads), elements(&our_grads));
            if round > 0 {
                times.push((stock_time.as_secs_f64(), our_time.as_secs_f64()));
            }
        }
        let median = |value: fn(&(f64, f64)) -> f64| {
            let mut values: Vec<f64> = times.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!(
            "{tokens:>6}  {:>8.2}  {:>7.2}  {:>10.2}  {:>20}  {:>4}",
            median(|t| t.0 * 1e3),
            median(|t| t.1 * 1e3),
            median(|t| t.0 / t.1),
            kept.0,
            kept.1,
        );
        assert_eq!(
            kept.1,
            LAYERS * 2 * RANK * WIDTH,
            "gradients of adapters alone"
        );
    }
    Ok(())
}

/// Runs the stack and times its backward pass.
fn backward(layers: &[impl Module], xs: &Tensor) -> Result<(Duration, GradStore)> {
    let mut ys = xs.clone();
    for layer in layers {
        ys = layer.forward(&ys)?;
    }
    let loss = ys.sqr()?.mean_all()?;
    let start = Instant::now();
    let grads = loss.backward()?;
    Ok((start.elapsed(), grads))
}

/// How many numbers a store keeps.
fn elements(grads: &GradStore) -> usize {
    let kept = grads.get_ids().filter_map(|id| grads.get_id(*id));
    kept.map(Tensor::elem_count).sum()
}
