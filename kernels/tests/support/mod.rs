//! Random layers, an f64 reference and error measures for the GPU tests.

#![allow(dead_code)] // each test file uses its part of this module

use std::io::{self, Write};
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use half::{bf16, f16};
use lora_kernels::{
    Dropout, Element, F32Math, Gradients, InputGradient, Kernels, LoraLinear, Rows, first_device,
};

/// The first device, or a line that says why the test does nothing.
pub fn device() -> Option<Arc<CudaContext>> {
    let context = first_device();
    if context.is_none() {
        eprintln!("skipped: no CUDA driver or no device here");
    }
    context
}

/// Fails, with this process, if it is still there after `limit`: blocks that wait for each other forever let no test end.
pub fn end_within(limit: Duration) {
    thread::spawn(move || {
        thread::sleep(limit);
        // Not by `eprintln`, which the test's output would hold back.
        let _ = writeln!(
            io::stderr(),
            "the card has not done its work within {limit:?}"
        );
        process::exit(1);
    });
}

/// Element types with conversions the reference needs.
pub trait Real: Element {
    /// Largest relative error allowed for this type.
    const TOLERANCE: f64;
    fn of(v: f32) -> Self;
    fn to(self) -> f64;
}
impl Real for f32 {
    const TOLERANCE: f64 = 1e-5;
    fn of(v: f32) -> Self {
        v
    }
    fn to(self) -> f64 {
        f64::from(self)
    }
}
impl Real for f16 {
    const TOLERANCE: f64 = 2e-3;
    fn of(v: f32) -> Self {
        Self::from_f32(v)
    }
    fn to(self) -> f64 {
        self.to_f64()
    }
}
impl Real for bf16 {
    const TOLERANCE: f64 = 1e-2;
    fn of(v: f32) -> Self {
        Self::from_f32(v)
    }
    fn to(self) -> f64 {
        self.to_f64()
    }
}

/// One layer and one batch.
#[derive(Clone, Debug)]
pub struct Case {
    pub tokens: usize,
    pub in_features: usize,
    pub out_features: usize,
    pub rank: usize,
    pub bias: bool,
    /// Elements before the first row of the input, and extra elements between rows.
    pub offset: usize,
    pub gap: usize,
    pub dropout: Option<Dropout>,
    pub post: bool,
}

impl Case {
    pub fn new(tokens: usize, in_features: usize, out_features: usize, rank: usize) -> Self {
        Self {
            tokens,
            in_features,
            out_features,
            rank,
            bias: false,
            offset: 0,
            gap: 0,
            dropout: None,
            post: false,
        }
    }
}

/// Uniform numbers in [-1, 1), the same for the same seed.
pub fn random<T: Real>(len: usize, seed: u64, scale: f32) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    for _ in 0..8 {
        next();
    }
    (0..len).map(|_| T::of(next() * scale)).collect()
}

/// Results of forward and backward, read back.
#[derive(PartialEq, Debug)]
pub struct Results {
    pub ys: Vec<f64>,
    pub dxs: Vec<f64>,
    pub da: Vec<f64>,
    pub db: Vec<f64>,
}

/// Host inputs of a case.
pub struct Inputs<T, P> {
    xs: Vec<T>,
    dys: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    a: Vec<P>,
    b: Vec<P>,
}

const SCALING: f32 = 1.7;

impl<T: Real, P: Real> Inputs<T, P> {
    pub fn new(case: &Case) -> Self {
        let Case {
            tokens,
            in_features,
            out_features,
            rank,
            offset,
            gap,
            ..
        } = *case;
        let fan = |n: usize| (3.0 / n as f32).sqrt();
        Self {
            xs: random(offset + tokens * (in_features + gap), 1, 1.0),
            dys: random(offset + tokens * (out_features + gap), 2, 1.0),
            weight: random(out_features * in_features, 3, fan(in_features)),
            bias: random(out_features, 4, 1.0),
            a: random(rank * in_features, 5, fan(in_features)),
            b: random(out_features * rank, 6, fan(rank)),
        }
    }

    /// Forward and backward on the device, memory poisoned before.
    pub fn on_device(&self, kernels: &Kernels, stream: &Arc<CudaStream>, case: &Case) -> Results {
        self.last_on_device(kernels, stream, case, 1)
    }

    /// The last of `times` forwards and backwards, which are not awaited one by one.
    pub fn last_on_device(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        case: &Case,
        times: usize,
    ) -> Results {
        let put = |v: &Vec<T>| stream.clone_htod(v).unwrap();
        let (xs, dys, weight, bias) = (
            put(&self.xs),
            put(&self.dys),
            put(&self.weight),
            put(&self.bias),
        );
        let behind = |v: &[P]| {
            let before = vec![P::of(f32::NAN); case.offset];
            stream.clone_htod(&[&before, v].concat()).unwrap()
        };
        let (a, b) = (behind(&self.a), behind(&self.b));
        let linear = LoraLinear {
            weight: weight.as_view(),
            bias: case.bias.then(|| bias.as_view()),
            a: a.slice(case.offset..),
            b: b.slice(case.offset..),
            in_features: case.in_features,
            out_features: case.out_features,
            rank: case.rank,
            scaling: SCALING,
            dropout: case.dropout,
            math: F32Math::Exact,
        };
        let rows = |data, cols| Rows {
            data,
            rows: case.tokens,
            cols,
            stride: cols + case.gap,
        };
        let xs = rows(xs.slice(case.offset..), case.in_features);
        let dys = rows(dys.slice(case.offset..), case.out_features);
        let run = || {
            let forward = kernels.forward(stream, &xs, &linear).unwrap();
            if times == 1 {
                poison(stream, case);
            }
            let saved = &forward.saved;
            let wanted = InputGradient::Wanted;
            let gradients = kernels
                .backward(stream, &xs, &dys, saved, &linear, wanted)
                .unwrap();
            (forward.ys, gradients)
        };
        poison(stream, case);
        for _ in 1..times {
            run();
        }
        let (ys, gradients) = run();
        let Gradients {
            xs: dxs,
            a: da,
            b: db,
        } = gradients;
        Results {
            ys: read(stream, &ys),
            dxs: read(stream, &dxs.unwrap()),
            da: read(stream, &da),
            db: read(stream, &db),
        }
    }

    /// The same in f64; `ys` and `dxs` only for every `stride`-th row.
    pub fn reference(&self, case: &Case, stride: usize) -> Results {
        let Case {
            tokens: m,
            in_features: k,
            out_features: n,
            rank: r,
            offset,
            gap,
            ..
        } = *case;
        let wide = |v: &[T]| v.iter().map(|v| v.to()).collect::<Vec<f64>>();
        let unstrided = |v: &[T], cols: usize| -> Vec<f64> {
            (0..m)
                .flat_map(|i| wide(&v[offset + i * (cols + gap)..][..cols]))
                .collect()
        };
        let (xs, dys, w) = (
            unstrided(&self.xs, k),
            unstrided(&self.dys, n),
            wide(&self.weight),
        );
        let a: Vec<f64> = self.a.iter().map(|v| v.to()).collect();
        let b: Vec<f64> = self.b.iter().map(|v| v.to()).collect();
        let s = f64::from(SCALING);
        let width = |post: bool| if post { n } else { k };
        let factor = |post: bool, row: usize, col: usize| match case.dropout {
            Some(d) if case.post == post => f64::from(d.factor(row as u64, col, width(post))),
            _ => 1.0,
        };
        let masked = |v: &[f64], post| {
            v.iter()
                .enumerate()
                .map(|(i, v)| v * factor(post, i / width(post), i % width(post)))
                .collect::<Vec<_>>()
        };
        let (dropped_xs, dropped_dys) = (masked(&xs, false), masked(&dys, true));

        let h = product(m, r, k, |i, j, l| dropped_xs[i * k + l] * a[j * k + l]); // [m, r]
        let dh = product(m, r, n, |i, j, l| s * dropped_dys[i * n + l] * b[l * r + j]); // [m, r]
        let da = product(r, k, m, |j, l, i| dh[i * r + j] * dropped_xs[i * k + l]);
        let db = product(n, r, m, |l, j, i| s * dropped_dys[i * n + l] * h[i * r + j]);
        let sampled: Vec<usize> = (0..m).step_by(stride).collect();
        let base = product(sampled.len(), n, k, |i, j, l| {
            xs[sampled[i] * k + l] * w[j * k + l]
        });
        let low = product(sampled.len(), n, r, |i, j, l| {
            s * h[sampled[i] * r + l] * b[j * r + l]
        });
        let ys = (0..base.len())
            .map(|at| {
                let (row, col) = (sampled[at / n], at % n);
                let bias = if case.bias { self.bias[col].to() } else { 0.0 };
                base[at] + bias + low[at] * factor(true, row, col)
            })
            .collect();
        let base = product(sampled.len(), k, n, |i, l, j| {
            dys[sampled[i] * n + j] * w[j * k + l]
        });
        let low = product(sampled.len(), k, r, |i, l, j| {
            dh[sampled[i] * r + j] * a[j * k + l]
        });
        let dxs = (0..base.len())
            .map(|at| base[at] + low[at] * factor(false, sampled[at / k], at % k))
            .collect();
        Results { ys, dxs, da, db }
    }
}

/// `out[i, j] = sum over l of term(i, j, l)`, rows over all cores.
fn product(
    rows: usize,
    cols: usize,
    inner: usize,
    term: impl Fn(usize, usize, usize) -> f64 + Sync,
) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    if out.is_empty() {
        return out;
    }
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let chunk = (rows * cols).div_ceil(threads);
    thread::scope(|scope| {
        for (block, part) in out.chunks_mut(chunk).enumerate() {
            let term = &term;
            scope.spawn(move || {
                for (at, value) in part.iter_mut().enumerate() {
                    let at = block * chunk + at;
                    *value = (0..inner).map(|l| term(at / cols, at % cols, l)).sum();
                }
            });
        }
    });
    out
}

/// Fills memory that the next allocations are likely to get with NaN.
fn poison(stream: &Arc<CudaStream>, case: &Case) {
    let sizes = [
        case.out_features,
        case.in_features,
        case.rank.next_multiple_of(64),
    ]
    .map(|c| case.tokens * c * 4);
    poison_sizes(
        stream,
        sizes.into_iter().chain([
            (case.in_features + case.out_features) * case.rank * 8,
            1 << 20,
        ]),
    );
}

/// Fills blocks of these sizes, in bytes, with NaN and frees them.
pub fn poison_sizes(stream: &Arc<CudaStream>, sizes: impl IntoIterator<Item = usize>) {
    let held: Vec<CudaSlice<u8>> = sizes
        .into_iter()
        .filter(|&bytes| bytes > 0)
        .map(|bytes| stream.clone_htod(&vec![0xff_u8; bytes]).unwrap())
        .collect();
    drop(held);
}

pub fn read<T: Real>(stream: &Arc<CudaStream>, slice: &CudaSlice<T>) -> Vec<f64> {
    if slice.is_empty() {
        return Vec::new();
    }
    stream
        .clone_dtoh(slice)
        .unwrap()
        .into_iter()
        .map(Real::to)
        .collect()
}

/// ‖found − expected‖ / ‖expected‖
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found
        .iter()
        .zip(expected)
        .map(|(f, e)| (f - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if norm == 0.0 {
        difference.sqrt()
    } else {
        (difference / norm).sqrt()
    }
}

/// Runs `case` twice and compares with the reference.
pub fn check<T: Real, P: Real>(kernels: &Kernels, stream: &Arc<CudaStream>, case: &Case) {
    let inputs = Inputs::<T, P>::new(case);
    let found = inputs.on_device(kernels, stream, case);
    let again = inputs.on_device(kernels, stream, case);
    for (name, a, b) in [
        ("ys", &found.ys, &again.ys),
        ("dxs", &found.dxs, &again.dxs),
        ("da", &found.da, &again.da),
        ("db", &found.db, &again.db),
    ] {
        assert!(
            a.iter().all(|v| v.is_finite()),
            "{name} has elements that were not written: {case:?}"
        );
        assert!(a == b, "{name} differs between two runs: {case:?}");
    }
    let stride = (case.tokens.saturating_sub(1) / 8).max(1); // to one of the last rows
    let expected = inputs.reference(case, stride);
    let sample = |v: &[f64], cols: usize| -> Vec<f64> {
        (0..case.tokens)
            .step_by(stride)
            .flat_map(|i| v[i * cols..(i + 1) * cols].to_vec())
            .collect()
    };
    for (name, found, expected) in [
        ("ys", sample(&found.ys, case.out_features), expected.ys),
        ("dxs", sample(&found.dxs, case.in_features), expected.dxs),
        ("da", found.da, expected.da),
        ("db", found.db, expected.db),
    ] {
        let error = relative_error(&found, &expected);
        assert!(
            error <= T::TOLERANCE,
            "{name}: relative error {error:e} in {:?}: {case:?}",
            T::DTYPE
        );
    }
}
