//! The fused attention of the CPU: one task for each block of query rows of a head.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, WithDType,
    backend::BackendStorage, bail,
};
use rayon::prelude::*;

use super::{NAME, Sequence};
use crate::nn::cpu::{
    BLOCK, Element, Matrix, Reader, Real, dispatch_float, fold, fold2, matmul_add,
    parallel_worthwhile, slice, vectorize,
};

/// Query rows in one block: their scores stay in the cache up to some thousand keys.
const ROWS: usize = 32;

/// Up to so many query rows, scores are taken row by row and the keys are not packed.
const FEW_ROWS: usize = 3;

pub(super) struct CausalAttention {
    sequences: Vec<Sequence>,
    scale: f64,
    /// The logarithm of the softmax's denominator `[H, T]`, from the forward for the backward.
    log_sums: OnceLock<Vec<f64>>,
}

/// The dimensions of q `[tokens, heads, dim]` and of k and v `[_, kv_heads, dim]`.
#[derive(Clone, Copy)]
struct Dims {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

/// What all blocks of one head of one sequence read.
#[derive(Clone, Copy)]
struct Head<'a, T> {
    seq: Sequence,
    head: usize,
    kv_head: usize,
    dims: Dims,
    scale: T,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    /// The keys of this head, see [`pack`]; empty when there are few rows.
    k_panels: &'a [T],
}

impl<T: Real> Head<'_, T> {
    fn q_stride(&self) -> usize {
        self.dims.heads * self.dims.dim
    }

    fn kv_stride(&self) -> usize {
        self.dims.kv_heads * self.dims.dim
    }

    /// The place of query row `row` of this head in q, y and their gradients.
    fn q_at(&self, row: usize) -> usize {
        (self.seq.q_start + row) * self.q_stride() + self.head * self.dims.dim
    }

    /// The place of the first key of this head in k and v.
    fn kv_at(&self) -> usize {
        self.seq.k_start * self.kv_stride() + self.kv_head * self.dims.dim
    }

    /// The rows of a block as a matrix `[rows, dim]`.
    fn q_rows<'a>(&self, q: &'a [T], row: usize) -> Matrix<'a, T> {
        Matrix {
            data: &q[self.q_at(row)..],
            row_stride: self.q_stride(),
            col_stride: 1,
        }
    }

    /// `a Kᵀ` (or `a Vᵀ`) for `rows` query rows from `row`, for the keys that the last of
    /// them sees.
    #[inline(always)]
    fn scores(&self, a: &[T], row: usize, rows: usize, keys: &[T], panels: &[T]) -> Vec<T> {
        let dim = self.dims.dim;
        let visible = self.seq.past() + row + rows;
        let mut scores = vec![T::ZERO; rows * visible];
        if panels.is_empty() {
            for (i, scores) in scores.chunks_exact_mut(visible).enumerate() {
                let a = &a[self.q_at(row + i)..][..dim];
                for (j, score) in scores.iter_mut().enumerate() {
                    let key = &keys[self.kv_at() + j * self.kv_stride()..][..dim];
                    *score = fold2(a, key, |a, b| a * b);
                }
            }
        } else {
            let a = self.q_rows(a, row);
            for (panel, j) in panels
                .chunks_exact(dim * BLOCK)
                .zip((0..visible).step_by(BLOCK))
            {
                let size = [rows, BLOCK.min(visible - j), dim];
                matmul_add(size, a, (panel, BLOCK), (&mut scores[j..], visible));
            }
        }
        scores
    }

    /// y `[rows, dim]` and the log-sums `[rows]` of a block.
    #[inline(always)]
    fn forward(&self, row: usize, rows: usize) -> (Vec<T>, Vec<T>) {
        let dim = self.dims.dim;
        let visible = self.seq.past() + row + rows;
        let mut probs = self.scores(self.q, row, rows, self.k, self.k_panels);
        let mut log_sums = Vec::with_capacity(rows);
        for (i, probs) in probs.chunks_exact_mut(visible).enumerate() {
            let (seen, hidden) = probs.split_at_mut(self.seq.past() + row + i + 1);
            let max = fold(seen, T::NEG_INFINITY, Real::larger, |x| x) * self.scale;
            for prob in seen.iter_mut() {
                *prob = (*prob * self.scale - max).exp();
            }
            let sum = fold(seen, T::ZERO, |a, b| a + b, |x| x);
            let norm = sum.recip();
            for prob in seen {
                *prob *= norm;
            }
            hidden.fill(T::ZERO);
            log_sums.push(sum.ln() + max);
        }
        let probs = Matrix {
            data: &probs,
            row_stride: visible,
            col_stride: 1,
        };
        let mut ys = vec![T::ZERO; rows * dim];
        let v = (&self.v[self.kv_at()..], self.kv_stride());
        matmul_add([rows, dim, visible], probs, v, (&mut ys, dim));
        (ys, log_sums)
    }

    /// Adds a block's part to dq `[q_len, dim]`, dk and dv `[k_len, dim]` of this head.
    #[inline(always)]
    fn backward(
        &self,
        (row, rows): (usize, usize),
        saved: &Saved<'_, T>,
        v_panels: &[T],
        [dq, dk, dv]: [&mut [T]; 3],
    ) {
        let dim = self.dims.dim;
        let visible = self.seq.past() + row + rows;
        let mut probs = self.scores(self.q, row, rows, self.k, self.k_panels);
        let mut ds = self.scores(saved.grad, row, rows, self.v, v_panels); // dp first
        let rows_of = probs
            .chunks_exact_mut(visible)
            .zip(ds.chunks_exact_mut(visible));
        for (i, (probs, ds)) in rows_of.enumerate() {
            let at = self.q_at(row + i);
            let delta: T = fold2(&saved.grad[at..][..dim], &saved.ys[at..][..dim], |g, y| {
                g * y
            });
            let token = self.seq.q_start + row + i;
            let log_sum = T::from_f64(saved.log_sums[self.head * self.dims.tokens + token]);
            let seen = self.seq.past() + row + i + 1;
            for (prob, ds) in probs[..seen].iter_mut().zip(&mut ds[..seen]) {
                *prob = (*prob * self.scale - log_sum).exp();
                *ds = self.scale * *prob * (*ds - delta);
            }
            probs[seen..].fill(T::ZERO);
            ds[seen..].fill(T::ZERO);
        }
        let by_row = Matrix {
            data: &ds,
            row_stride: visible,
            col_stride: 1,
        };
        let by_key = |data| Matrix {
            data,
            row_stride: 1,
            col_stride: visible,
        };
        let k = (&self.k[self.kv_at()..], self.kv_stride());
        let q = (&self.q[self.q_at(row)..], self.q_stride());
        let grad = (&saved.grad[self.q_at(row)..], self.q_stride());
        matmul_add([rows, dim, visible], by_row, k, (&mut dq[row * dim..], dim));
        matmul_add([visible, dim, rows], by_key(&ds), q, (dk, dim));
        matmul_add([visible, dim, rows], by_key(&probs), grad, (dv, dim));
    }
}

/// What the forward leaves for the backward.
struct Saved<'a, T> {
    ys: &'a [T],
    grad: &'a [T],
    log_sums: &'a [f64],
}

/// Keys (or values) of one head as panels of [`BLOCK`] keys: `[k_len / BLOCK, dim, BLOCK]`, filled up
/// with zeros, so that a matrix product reads them in order.
fn pack<T: Real>(xs: &[T], seq: Sequence, kv_head: usize, dims: Dims) -> Vec<T> {
    if seq.q_len <= FEW_ROWS {
        return Vec::new();
    }
    let dim = dims.dim;
    let mut panels = vec![T::ZERO; seq.k_len.next_multiple_of(BLOCK) * dim];
    for (j, panel) in panels.chunks_exact_mut(dim * BLOCK).enumerate() {
        for lane in 0..BLOCK.min(seq.k_len - j * BLOCK) {
            let key = seq.k_start + j * BLOCK + lane;
            let key = &xs[(key * dims.kv_heads + kv_head) * dim..][..dim];
            for (d, &x) in key.iter().enumerate() {
                panel[d * BLOCK + lane] = x;
            }
        }
    }
    panels
}

/// Maps `f` over the items, on several threads where `work` elements are worth it, in order.
fn map_all<I: Sync, R: Send>(
    items: &[I],
    work: usize,
    f: impl Fn(&I) -> R + Send + Sync,
) -> Vec<R> {
    if parallel_worthwhile(work) {
        items.par_iter().map(f).collect()
    } else {
        items.iter().map(f).collect()
    }
}

impl CausalAttention {
    pub(super) fn new(sequences: Vec<Sequence>, scale: f64) -> Self {
        Self {
            sequences,
            scale,
            log_sums: OnceLock::new(),
        }
    }

    /// About how many scores there are, to decide on threads.
    fn work(&self, dims: Dims) -> usize {
        let scores = self.sequences.iter().map(|seq| seq.q_len * seq.k_len);
        scores.sum::<usize>() * dims.heads
    }

    /// The panels of every (sequence, key head).
    fn pack_all<T: Real>(&self, xs: &[T], dims: Dims) -> Vec<Vec<T>> {
        let heads: Vec<_> = (self.sequences.iter())
            .flat_map(|&seq| (0..dims.kv_heads).map(move |kv_head| (seq, kv_head)))
            .collect();
        map_all(&heads, xs.len(), |&(seq, kv_head)| {
            pack(xs, seq, kv_head, dims)
        })
    }

    /// Every (index of a sequence, head).
    fn heads(&self, dims: Dims) -> impl Iterator<Item = (usize, usize)> {
        (0..self.sequences.len()).flat_map(move |i| (0..dims.heads).map(move |head| (i, head)))
    }

    fn head<'a, T: Real>(
        &self,
        (i, head): (usize, usize),
        dims: Dims,
        [q, k, v]: [&'a [T]; 3],
        k_panels: &'a [Vec<T>],
    ) -> Head<'a, T> {
        let kv_head = head / (dims.heads / dims.kv_heads);
        Head {
            seq: self.sequences[i],
            head,
            kv_head,
            dims,
            scale: T::from_f64(self.scale),
            q,
            k,
            v,
            k_panels: &k_panels[i * dims.kv_heads + kv_head],
        }
    }

    fn forward<E: Element>(&self, [q, k, v]: [&[E]; 3], dims: Dims) -> Vec<E> {
        let (q, k, v) = (E::widen_all(q), E::widen_all(k), E::widen_all(v));
        let qkv = [&q[..], &k[..], &v[..]];
        let k_panels = self.pack_all(&k, dims);
        let blocks: Vec<_> = self
            .heads(dims)
            .flat_map(|(i, head)| {
                let starts = (0..self.sequences[i].q_len).step_by(ROWS);
                starts.map(move |row| (i, head, row))
            })
            .collect();
        let outputs = map_all(&blocks, self.work(dims), |&(i, head, row)| {
            let rows = ROWS.min(self.sequences[i].q_len - row);
            let head = self.head((i, head), dims, qkv, &k_panels);
            vectorize(
                #[inline(always)]
                || head.forward(row, rows),
            )
        });

        let dim = dims.dim;
        let mut ys = vec![E::Acc::ZERO; q.len()];
        let mut all_log_sums = vec![0f64; dims.heads * dims.tokens];
        for (&(i, head, row), (block, log_sums)) in blocks.iter().zip(&outputs) {
            let token = self.sequences[i].q_start + row;
            for (r, (y, log_sum)) in block.chunks_exact(dim).zip(log_sums).enumerate() {
                ys[((token + r) * dims.heads + head) * dim..][..dim].copy_from_slice(y);
                all_log_sums[head * dims.tokens + token + r] = log_sum.to_f64();
            }
        }
        self.log_sums.get_or_init(|| all_log_sums);
        E::narrow_all(ys)
    }

    fn backward<E: Element>(
        &self,
        [q, k, v]: [&Tensor; 3],
        ys: &Tensor,
        grad: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("{NAME}: backward before forward")
        };
        let dims = Dims::new(q.shape(), k.shape())?;
        let grad = grad.contiguous()?;
        let readers = [q, k, v, ys, &grad].map(Reader::new);
        let read = |i: usize| Ok::<_, candle_core::Error>(E::widen_all(readers[i].slice::<E>()?));
        let (q_all, k_all, v_all, ys, grad) = (read(0)?, read(1)?, read(2)?, read(3)?, read(4)?);
        let qkv = [&q_all[..], &k_all[..], &v_all[..]];
        let saved = Saved {
            ys: &ys,
            grad: &grad,
            log_sums,
        };
        let k_panels = self.pack_all(&k_all, dims);
        let v_panels = self.pack_all(&v_all, dims);
        let dim = dims.dim;
        let heads: Vec<_> = self.heads(dims).collect();
        let parts = map_all(&heads, self.work(dims), |&(i, head)| {
            let seq = self.sequences[i];
            let head = self.head((i, head), dims, qkv, &k_panels);
            let v_panels = &v_panels[i * dims.kv_heads + head.kv_head];
            let zeros = |len: usize| vec![E::Acc::ZERO; len * dim];
            let (mut dq, mut dk, mut dv) = (zeros(seq.q_len), zeros(seq.k_len), zeros(seq.k_len));
            for row in (0..seq.q_len).step_by(ROWS) {
                let rows = ROWS.min(seq.q_len - row);
                let grads = [&mut dq[..], &mut dk, &mut dv];
                vectorize(
                    #[inline(always)]
                    || head.backward((row, rows), &saved, v_panels, grads),
                );
            }
            [dq, dk, dv]
        });

        let mut dq_all = vec![E::Acc::ZERO; q_all.len()];
        let mut dk_all = vec![E::Acc::ZERO; k_all.len()];
        let mut dv_all = vec![E::Acc::ZERO; v_all.len()];
        for (&(i, head), [dq, dk, dv]) in heads.iter().zip(&parts) {
            let seq = self.sequences[i];
            let kv_head = head / (dims.heads / dims.kv_heads);
            for (row, dq) in dq.chunks_exact(dim).enumerate() {
                let at = ((seq.q_start + row) * dims.heads + head) * dim;
                dq_all[at..][..dim].copy_from_slice(dq);
            }
            // The query heads of a group add up in their order.
            for (all, part) in [(&mut dk_all, dk), (&mut dv_all, dv)] {
                for (key, part) in part.chunks_exact(dim).enumerate() {
                    let at = ((seq.k_start + key) * dims.kv_heads + kv_head) * dim;
                    for (sum, &x) in all[at..][..dim].iter_mut().zip(part) {
                        *sum += x;
                    }
                }
            }
        }
        let tensor =
            |xs, like: &Tensor| Tensor::from_vec(E::narrow_all(xs), like.shape(), &Device::Cpu);
        Ok([tensor(dq_all, q)?, tensor(dk_all, k)?, tensor(dv_all, v)?])
    }
}

impl Dims {
    fn new(q: &Shape, k: &Shape) -> Result<Self> {
        let (tokens, heads, dim) = q.dims3()?;
        let (_, kv_heads, _) = k.dims3()?;
        Ok(Self {
            tokens,
            heads,
            kv_heads,
            dim,
        })
    }
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = q_layout.shape();
        let dims = Dims::new(shape, k_layout.shape())?;
        dispatch_float!(NAME, q.dtype(), E => {
            let qkv = [slice(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?];
            let ys = self.forward::<E>(qkv, dims);
            Ok((E::to_cpu_storage_owned(ys), shape.clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        ys: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = dispatch_float!(NAME, q.dtype(), E => {
            self.backward::<E>([q, k, v], ys, grad)?
        });
        Ok((
            q.track_op().then_some(dq),
            k.track_op().then_some(dk),
            v.track_op().then_some(dv),
        ))
    }
}
