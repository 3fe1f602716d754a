//! Linears that share their input, against the same linears one by one. Needs a device.

mod support;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use lora_kernels::{
    Dropout, Error, F32Math, GroupLayout, InputGradient, Kernels, LoraLinear, Member, Place, Rows,
};

use support::{Real, device, poison_sizes, random, read, relative_error};

const IN: usize = 264;
const MEMBERS: [(usize, usize, f32); 3] = [(512, 16, 0.5), (136, 8, 2.0), (200, 24, 1.25)];

struct Weights<T, P> {
    weight: CudaSlice<T>,
    a: CudaSlice<P>,
    b: CudaSlice<P>,
    dys: CudaSlice<T>,
}

fn weights<T: Real, P: Real>(stream: &Arc<CudaStream>, tokens: usize) -> Vec<Weights<T, P>> {
    let put = |v: Vec<T>| stream.clone_htod(&v).unwrap();
    let wide = |v: Vec<P>| stream.clone_htod(&v).unwrap();
    MEMBERS
        .iter()
        .enumerate()
        .map(|(i, &(out, rank, _))| {
            let seed = 10 * i as u64;
            Weights {
                weight: put(random(out * IN, seed + 1, 0.1)),
                a: wide(random(rank * IN, seed + 2, 0.1)),
                b: wide(random(out * rank, seed + 3, 0.3)),
                dys: put(random(tokens * out, seed + 4, 1.0)),
            }
        })
        .collect()
}

fn linear<'a, T: Real, P: Real>(
    weights: &'a Weights<T, P>,
    (out_features, rank, scaling): (usize, usize, f32),
    dropout: Option<Dropout>,
) -> LoraLinear<'a, T, P> {
    LoraLinear {
        weight: weights.weight.as_view(),
        bias: None,
        a: weights.a.as_view(),
        b: weights.b.as_view(),
        in_features: IN,
        out_features,
        rank,
        scaling,
        dropout,
        math: F32Math::Exact,
    }
}

/// y, dx, dA and dB of every member.
type Results = Vec<[Vec<f64>; 4]>;

fn one_by_one<T: Real, P: Real>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    xs: &Rows<T>,
    weights: &[Weights<T, P>],
    dropout: Option<Dropout>,
) -> Results {
    weights
        .iter()
        .zip(MEMBERS)
        .map(|(w, member)| {
            let linear = linear(w, member, dropout);
            let forward = kernels.forward(stream, xs, &linear).unwrap();
            let dys = Rows::packed(w.dys.as_view(), xs.rows, member.0);
            let gradients = kernels
                .backward(
                    stream,
                    xs,
                    &dys,
                    &forward.saved,
                    &linear,
                    InputGradient::Wanted,
                )
                .unwrap();
            [
                read(stream, &forward.ys),
                read(stream, &gradients.xs.unwrap()),
                read(stream, &gradients.a),
                read(stream, &gradients.b),
            ]
        })
        .collect()
}

fn grouped<T: Real, P: Real>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    xs: &Rows<T>,
    weights: &[Weights<T, P>],
    dropout: Option<Dropout>,
) -> Results {
    let members: Vec<_> = weights
        .iter()
        .zip(MEMBERS)
        .map(|(w, (_, rank, scaling))| Member {
            a: w.a.as_view(),
            rank,
            scaling,
        })
        .collect();
    let layout = GroupLayout::new(&MEMBERS.map(|m| m.1)).unwrap();
    let bytes = xs.rows * layout.width() * size_of::<T>();
    poison_sizes(stream, [bytes, bytes, 1 << 20]);
    let s = kernels.shrink_group(stream, xs, &members).unwrap();
    poison_sizes(stream, [bytes, xs.rows * 512 * size_of::<T>(), 1 << 20]);
    let mut ds = stream.clone_htod(&vec![T::of(f32::NAN); s.len()]).unwrap();
    let mut results: Results = Vec::new();
    for ((w, member), &columns) in weights.iter().zip(MEMBERS).zip(layout.columns()) {
        let linear = linear(w, member, dropout);
        let forward = kernels
            .forward_from(stream, xs, &linear, &s.as_view(), columns)
            .unwrap();
        let dys = Rows::packed(w.dys.as_view(), xs.rows, member.0);
        let (dxs, db) = kernels
            .backward_from(
                stream,
                &dys,
                &forward.packed,
                &linear,
                (&s.as_view(), &mut ds.as_view_mut()),
                columns,
                InputGradient::Wanted,
            )
            .unwrap();
        results.push([
            read(stream, &forward.ys),
            read(stream, &dxs.unwrap()),
            Vec::new(),
            read(stream, &db),
        ]);
    }
    let das: Vec<CudaSlice<P>> = kernels
        .outer_group(stream, xs, &ds.as_view(), &layout)
        .unwrap();
    for (result, da) in results.iter_mut().zip(&das) {
        result[2] = read(stream, da);
    }
    results
}

fn check<T: Real, P: Real>(kernels: &Kernels, stream: &Arc<CudaStream>, tokens: usize) {
    let weights = weights::<T, P>(stream, tokens);
    let xs = stream
        .clone_htod(&random::<T>(tokens * IN, 5, 1.0))
        .unwrap();
    let xs = Rows::packed(xs.as_view(), tokens, IN);
    for dropout in [
        None,
        Some(Dropout::new(Place::Post, 0.25, 1, 2, 3).unwrap()),
    ] {
        let expected = one_by_one(kernels, stream, &xs, &weights, dropout);
        let found = grouped(kernels, stream, &xs, &weights, dropout);
        assert!(
            found == grouped(kernels, stream, &xs, &weights, dropout),
            "two runs differ"
        );
        for (member, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (name, i) in [("y", 0), ("dx", 1), ("dA", 2), ("dB", 3)] {
                assert!(found[i].iter().all(|v| v.is_finite()), "{name} of {member}");
                let error = relative_error(&found[i], &expected[i]);
                assert!(
                    error <= T::TOLERANCE,
                    "{name} of member {member}: {error:e} in {:?}, {tokens} tokens",
                    T::DTYPE
                );
            }
        }
    }
}

#[test]
fn a_group_equals_its_members() {
    let Some(context) = device() else { return };
    let kernels = Kernels::new(&context).unwrap();
    let stream = context.per_thread_stream();
    for tokens in [0, 1, 7, 300, 2049] {
        check::<f32, f32>(&kernels, &stream, tokens);
        check::<bf16, f32>(&kernels, &stream, tokens);
        check::<f16, f16>(&kernels, &stream, tokens);
    }
}

#[test]
fn dropout_on_the_input_is_refused() {
    let Some(context) = device() else { return };
    let kernels = Kernels::new(&context).unwrap();
    let stream = context.per_thread_stream();
    let weights = weights::<bf16, f32>(&stream, 4);
    let layout = GroupLayout::new(&MEMBERS.map(|m| m.1)).unwrap();
    let xs = stream.clone_htod(&random::<bf16>(4 * IN, 5, 1.0)).unwrap();
    let s = stream
        .clone_htod(&vec![bf16::ZERO; 4 * layout.width()])
        .unwrap();
    let dropout = Dropout::new(Place::Pre, 0.25, 1, 2, 3).unwrap();
    let result = kernels.forward_from(
        &stream,
        &Rows::packed(xs.as_view(), 4, IN),
        &linear(&weights[0], MEMBERS[0], Some(dropout)),
        &s.as_view(),
        layout.columns()[0],
    );
    assert!(matches!(result, Err(Error::GroupedDropout)));
}
