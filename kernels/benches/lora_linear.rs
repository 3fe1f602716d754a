//! R = (LoRA forward + dx + dA + dB) / (frozen forward + dx), baseline and candidate interleaved.
//!
//! `cargo bench -p lora-kernels`; needs a device, and says so where there is none. Of up to 128 tokens the
//! ratio of the forwards is what counts, and a fill of memory runs before each: it leaves neither the
//! weight in the L2 cache, where a model's other layers would not either, nor the device waiting for the
//! host, which is slower than so short a layer. Arguments after `--`: `once M K N r p` runs one forward and
//! backward (for a profiler), `quick` takes fewer repetitions, `general` and `hopper` take that path,
//! `8192x4096x4096` and the like choose shapes.

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError};
use half::bf16;
use lora_kernels::{
    Dropout, F32Math, InputGradient, Kernels, LoraLinear, Place, Preference, Rows, first_device,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One row of the table.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    in_features: usize,
    out_features: usize,
    rank: usize,
    p: f64,
    must: Option<f64>,
}

const fn shape(
    tokens: usize,
    in_features: usize,
    out_features: usize,
    rank: usize,
    p: f64,
    must: f64,
) -> Shape {
    Shape {
        tokens,
        in_features,
        out_features,
        rank,
        p,
        must: Some(must),
    }
}

const SHAPES: [Shape; 14] = [
    shape(8192, 4096, 4096, 16, 0.0, 1.10),
    shape(8192, 4096, 4096, 16, 0.1, 1.10),
    shape(8192, 4096, 14336, 16, 0.0, 1.05),
    shape(8192, 4096, 14336, 16, 0.1, 1.05),
    shape(8192, 14336, 4096, 16, 0.0, 1.06),
    shape(8192, 14336, 4096, 16, 0.1, 1.06),
    shape(8192, 2048, 2048, 16, 0.0, 1.20),
    shape(8192, 2048, 2048, 16, 0.1, 1.20),
    shape(8192, 8192, 8192, 16, 0.0, 1.05),
    shape(8192, 8192, 8192, 16, 0.1, 1.05),
    shape(8192, 4096, 4096, 64, 0.0, 1.12),
    shape(8192, 4096, 4096, 64, 0.1, 1.12),
    shape(2048, 4096, 4096, 16, 0.0, 1.15),
    shape(2048, 4096, 4096, 16, 0.1, 1.15),
];

/// Decoding: few tokens, forward alone counts.
const DECODE: [Shape; 5] = [
    shape(1, 4096, 4096, 16, 0.0, 1.15),
    shape(8, 4096, 4096, 16, 0.0, 1.15),
    shape(16, 4096, 4096, 16, 0.0, 1.15),
    shape(64, 4096, 4096, 16, 0.0, 1.15),
    shape(FEW_TOKENS, 4096, 4096, 16, 0.0, 1.15),
];
/// Most of them.
const FEW_TOKENS: usize = 128;

fn main() -> Result<()> {
    let Some(context) = first_device() else {
        println!("skipped: no CUDA driver or no device here");
        return Ok(());
    };
    let stream = context.per_thread_stream(); // as candle does
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let asked = |name: &str| args.iter().any(|a| a == name);
    let preference = if asked("general") {
        Preference::General
    } else if asked("hopper") {
        Preference::Hopper
    } else {
        Preference::Fastest
    };
    let kernels = Kernels::new(&context)?.prefer(preference);
    if args.first().is_some_and(|a| a == "once") {
        let number = |i: usize| {
            args.get(i)
                .and_then(|a| a.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        let s = Shape {
            tokens: number(1) as usize,
            in_features: number(2) as usize,
            out_features: number(3) as usize,
            rank: number(4) as usize,
            p: number(5),
            must: None,
        };
        let layer = Layer::new(&stream, s)?;
        for _ in 0..2 {
            layer.lora(&kernels, &stream)?;
            layer.frozen(&kernels, &stream)?;
        }
        return Ok(stream.synchronize()?);
    }
    println!("{}, {}, {preference:?}", context.name()?, kernels.arch());
    let repetitions = if args.iter().any(|a| a == "quick") {
        20
    } else {
        60
    };
    println!(
        "| tokens | in→out | r | p | frozen µs | LoRA µs | forward | backward | R | must | reached |"
    );
    println!("|--|--|--|--|--|--|--|--|--|--|--|");
    let chosen: Vec<&String> = args.iter().filter(|a| a.contains('x')).collect();
    for s in SHAPES.into_iter().chain(DECODE) {
        let name = format!("{}x{}x{}", s.tokens, s.in_features, s.out_features);
        if !chosen.is_empty() && !chosen.iter().any(|&c| *c == name) {
            continue;
        }
        let mut layer = Layer::new(&stream, s)?;
        let m = layer.measure(&kernels, &stream, repetitions)?;
        let must = s.must.map_or(String::new(), |m| format!("{m:.2}"));
        let judged = if s.tokens <= FEW_TOKENS {
            m.forward
        } else {
            m.ratio
        };
        let reached = s
            .must
            .map_or("", |must| if judged <= must { "yes" } else { "no" });
        println!(
            "| {} | {}→{} | {} | {} | {:.0} | {:.0} | {:.3} | {:.3} | {:.3} | {must} | {reached} |",
            s.tokens,
            s.in_features,
            s.out_features,
            s.rank,
            s.p,
            m.frozen,
            m.lora,
            m.forward,
            m.backward,
            m.ratio
        );
    }
    Ok(())
}

/// Medians: microseconds, and ratios of neighbouring runs.
struct Measured {
    frozen: f64,
    lora: f64,
    forward: f64,
    backward: f64,
    ratio: f64,
}

/// Device data of one row.
struct Layer {
    shape: Shape,
    xs: CudaSlice<bf16>,
    dys: CudaSlice<bf16>,
    weight: CudaSlice<bf16>,
    a: CudaSlice<f32>,
    b: CudaSlice<f32>,
    /// What is filled before a layer of few tokens.
    filled: Option<CudaSlice<u8>>,
}

/// Bytes: several L2 caches, and longer to write than a layer is to launch.
const FILLED: usize = 1 << 30;

impl Layer {
    fn new(stream: &Arc<CudaStream>, shape: Shape) -> Result<Self> {
        let half = |len: usize, seed| random(len, seed).map(bf16::from_f32).collect::<Vec<_>>();
        let full = |len: usize, seed| random(len, seed).collect::<Vec<_>>();
        let Shape {
            tokens,
            in_features,
            out_features,
            rank,
            ..
        } = shape;
        Ok(Self {
            shape,
            xs: stream.clone_htod(&half(tokens * in_features, 1))?,
            dys: stream.clone_htod(&half(tokens * out_features, 2))?,
            weight: stream.clone_htod(&half(out_features * in_features, 3))?,
            a: stream.clone_htod(&full(rank * in_features, 4))?,
            b: stream.clone_htod(&full(out_features * rank, 5))?,
            filled: match tokens {
                ..=FEW_TOKENS => Some(stream.alloc_zeros(FILLED)?),
                _ => None,
            },
        })
    }

    fn rows(&self) -> (Rows<'_, bf16>, Rows<'_, bf16>) {
        let Shape {
            tokens,
            in_features,
            out_features,
            ..
        } = self.shape;
        (
            Rows::packed(self.xs.as_view(), tokens, in_features),
            Rows::packed(self.dys.as_view(), tokens, out_features),
        )
    }

    /// Forward and backward of the frozen linear; the event between them is returned.
    fn frozen(&self, kernels: &Kernels, stream: &Arc<CudaStream>) -> Result<CudaEvent> {
        let (xs, dys) = self.rows();
        let weight = self.weight.as_view();
        let weight = (&weight, self.shape.out_features, self.shape.in_features);
        let ys = kernels.frozen(stream, &xs, weight, false)?;
        let middle = event(stream)?;
        let dxs = kernels.frozen(stream, &dys, weight, true)?;
        drop((ys, dxs));
        Ok(middle)
    }

    fn lora(&self, kernels: &Kernels, stream: &Arc<CudaStream>) -> Result<CudaEvent> {
        let (xs, dys) = self.rows();
        let Shape {
            in_features,
            out_features,
            rank,
            p,
            ..
        } = self.shape;
        let linear = LoraLinear {
            weight: self.weight.as_view(),
            bias: None,
            a: self.a.as_view(),
            b: self.b.as_view(),
            in_features,
            out_features,
            rank,
            scaling: 2.0,
            dropout: Some(Dropout::new(Place::Pre, p, 42, 7, 3)?),
            math: F32Math::Exact,
        };
        let forward = kernels.forward(stream, &xs, &linear)?;
        let middle = event(stream)?;
        let gradients = kernels.backward(
            stream,
            &xs,
            &dys,
            &forward.saved,
            &linear,
            InputGradient::Wanted,
        )?;
        drop((forward, gradients));
        Ok(middle)
    }

    /// An event to measure from.
    fn begin(&mut self, stream: &Arc<CudaStream>) -> Result<CudaEvent> {
        if let Some(filled) = &mut self.filled {
            stream.memset_zeros(filled)?;
        }
        event(stream)
    }

    fn measure(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        repetitions: usize,
    ) -> Result<Measured> {
        for _ in 0..3 {
            self.frozen(kernels, stream)?;
            self.lora(kernels, stream)?;
        }
        stream.synchronize()?;
        let mut runs = Vec::new();
        for _ in 0..repetitions {
            let start = self.begin(stream)?;
            let frozen = (start, self.frozen(kernels, stream)?, event(stream)?);
            let start = self.begin(stream)?;
            let lora = (start, self.lora(kernels, stream)?, event(stream)?);
            runs.push([frozen, lora]);
        }
        stream.synchronize()?;
        let us = |a: &CudaEvent, b| a.elapsed_ms(b).map(|ms| f64::from(ms) * 1e3);
        let mut columns: [Vec<f64>; 5] = Default::default();
        for run in &runs {
            let [frozen, lora] = run.each_ref().map(|(start, middle, end)| {
                Ok::<_, DriverError>((us(start, middle)?, us(middle, end)?))
            });
            let (frozen, lora) = (frozen?, lora?);
            let (frozen_all, lora_all) = (frozen.0 + frozen.1, lora.0 + lora.1);
            let row = [
                frozen_all,
                lora_all,
                lora.0 / frozen.0,
                lora.1 / frozen.1,
                lora_all / frozen_all,
            ];
            for (column, value) in columns.iter_mut().zip(row) {
                column.push(value);
            }
        }
        let [frozen, lora, forward, backward, ratio] = columns.map(median);
        Ok(Measured {
            frozen,
            lora,
            forward,
            backward,
            ratio,
        })
    }
}

fn event(stream: &Arc<CudaStream>) -> Result<CudaEvent> {
    Ok(stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Numbers in [-1, 1).
fn random(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    })
}
