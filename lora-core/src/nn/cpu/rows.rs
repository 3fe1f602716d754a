//! Loops over the rows of a tensor.

use rayon::prelude::*;

use super::{Element, Real};

/// About how many elements one task writes.
const CHUNK: usize = 1 << 13;

/// Whether an op that writes so many elements gains from several threads.
pub(crate) fn parallel_worthwhile(elements: usize) -> bool {
    elements > 2 * CHUNK
}

/// Calls `f(first row, rows)` on chunks of whole rows of `ys` and returns what it returned, in order.
pub(crate) fn map_rows<T: Send, R: Send>(
    ys: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    if ys.is_empty() {
        return Vec::new();
    }
    let rows = (CHUNK / width).max(1);
    if parallel_worthwhile(ys.len()) {
        ys.par_chunks_mut(rows * width)
            .enumerate()
            .map(|(i, chunk)| f(i * rows, chunk))
            .collect()
    } else {
        ys.chunks_mut(rows * width)
            .enumerate()
            .map(|(i, chunk)| f(i * rows, chunk))
            .collect()
    }
}

/// [`map_rows`] over two outputs of the same shape.
pub(crate) fn map_row_pairs<T: Send>(
    ys: &mut [T],
    zs: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) {
    if ys.is_empty() {
        return;
    }
    let rows = (CHUNK / width).max(1);
    if parallel_worthwhile(ys.len()) {
        ys.par_chunks_mut(rows * width)
            .zip(zs.par_chunks_mut(rows * width))
            .enumerate()
            .for_each(|(i, (ys, zs))| f(i * rows, ys, zs));
    } else {
        ys.chunks_mut(rows * width)
            .zip(zs.chunks_mut(rows * width))
            .enumerate()
            .for_each(|(i, (ys, zs))| f(i * rows, ys, zs));
    }
}

/// Independent partial results, so that a reduction is not one chain of additions.
const LANES: usize = 32;

/// Reduces `map(x)` over `xs` with `reduce`.
#[inline(always)]
pub(crate) fn fold<T: Element>(
    xs: &[T],
    start: T::Acc,
    reduce: impl Fn(T::Acc, T::Acc) -> T::Acc,
    map: impl Fn(T::Acc) -> T::Acc,
) -> T::Acc {
    let mut lanes = [start; LANES];
    let (chunks, rest) = xs.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = reduce(*lane, map(x.widen()));
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = reduce(*lane, map(x.widen()));
    }
    lanes.into_iter().fold(start, reduce)
}

/// The sum of `map(x, y)` over two slices of one length.
#[inline(always)]
pub(crate) fn fold2<T: Element, A: Real>(
    xs: &[T],
    ys: &[T],
    map: impl Fn(T::Acc, T::Acc) -> A,
) -> A {
    let mut lanes = [A::ZERO; LANES];
    let (x_chunks, x_rest) = xs.as_chunks::<LANES>();
    let (y_chunks, y_rest) = ys.as_chunks::<LANES>();
    for (x_chunk, y_chunk) in x_chunks.iter().zip(y_chunks) {
        for ((lane, x), y) in lanes.iter_mut().zip(x_chunk).zip(y_chunk) {
            *lane += map(x.widen(), y.widen());
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += map(x.widen(), y.widen());
    }
    lanes.into_iter().fold(A::ZERO, |sum, lane| sum + lane)
}

/// The sums of both results of `map(x, y, z)` over three slices of one length.
#[inline(always)]
pub(crate) fn fold3<T: Element>(
    xs: &[T],
    ys: &[T],
    zs: &[T],
    map: impl Fn(T::Acc, T::Acc, T::Acc) -> (T::Acc, T::Acc),
) -> (T::Acc, T::Acc) {
    let zero = T::Acc::ZERO;
    let (mut first, mut second) = ([zero; LANES], [zero; LANES]);
    let (x_chunks, x_rest) = xs.as_chunks::<LANES>();
    let (y_chunks, y_rest) = ys.as_chunks::<LANES>();
    let (z_chunks, z_rest) = zs.as_chunks::<LANES>();
    let mut add = |lane: usize, x: T, y: T, z: T| {
        let (a, b) = map(x.widen(), y.widen(), z.widen());
        first[lane] += a;
        second[lane] += b;
    };
    for ((xs, ys), zs) in x_chunks.iter().zip(y_chunks).zip(z_chunks) {
        for i in 0..LANES {
            add(i, xs[i], ys[i], zs[i]);
        }
    }
    for (i, ((&x, &y), &z)) in x_rest.iter().zip(y_rest).zip(z_rest).enumerate() {
        add(i, x, y, z);
    }
    let sum = |lanes: [T::Acc; LANES]| lanes.into_iter().fold(zero, |sum, lane| sum + lane);
    (sum(first), sum(second))
}
