//! Causal self-attention over packed sequences.
//!
//! For each query row of a head, over the keys it sees:
//!
//! ```text
//! p  = softmax(scale q Kᵀ)            y  = p V
//! dp = dy Vᵀ     ds = scale p (dp - dy·y)
//! dq = ds K      dK = dsᵀ q           dV = pᵀ dy
//! ```
//!
//! The forward keeps one number a row (the logarithm of the softmax's denominator), from which the
//! backward computes p again, so no tokens × tokens matrix outlives a block of rows
//! ([Dao et al., 2022](https://arxiv.org/abs/2205.14135)).

mod composed;
mod cpu;

use candle_core::{Result, Tensor, bail};

/// `softmax(scale q Kᵀ + causal mask) V` over several sequences that are packed one after the other
/// without padding; no sequence sees another.
///
/// - `q` `[T, H, D]`, `k` and `v` `[S, Hkv, D]`, all of one dtype. H is a multiple of Hkv, and query head h reads
///   key and value head `h / (H / Hkv)` (grouped-query attention).
/// - `q_lens` and `k_lens`: the lengths of the sequences, which sum to T and S. The queries of a
///   sequence are its last positions: equal lengths when a whole text is read, one query when a
///   text is continued with cached keys and values. Query i of n sees keys `..=k_len - n + i`.
/// - `scale`: usually `1 / sqrt(D)`.
///
/// The result is `[T, H, D]`. Half types are computed in f32. On the CPU it is one fused op, parallel
/// over sequences and heads; on other devices it runs as candle's differentiable ops, sequence by
/// sequence.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use lora_core::nn::causal_attention;
///
/// let dev = Device::Cpu;
/// let q = Tensor::zeros((3, 1, 1), candle_core::DType::F32, &dev)?; // equal weight for all keys
/// let v = Tensor::new(&[2f32, 4., 9.], &dev)?.reshape((3, 1, 1))?;
/// // A sequence of two tokens and one of one token.
/// let ys = causal_attention(&q, &v, &v, &[2, 1], &[2, 1], 1.0)?;
/// assert_eq!(ys.flatten_all()?.to_vec1::<f32>()?, [2., 3., 9.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// When shapes, dtypes and lengths do not fit together, naming them.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    q_lens: &[usize],
    k_lens: &[usize],
    scale: f64,
) -> Result<Tensor> {
    let (tokens, heads, dim) = q.dims3()?;
    let (keys, kv_heads, key_dim) = k.dims3()?;
    if k.shape() != v.shape() || key_dim != dim || kv_heads == 0 || !heads.is_multiple_of(kv_heads)
    {
        bail!(
            "{NAME}: q {:?}, k {:?} and v {:?} should be [T, H, D], [S, Hkv, D] and [S, Hkv, D] \
             with H a multiple of Hkv",
            q.shape(),
            k.shape(),
            v.shape()
        )
    }
    if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        bail!(
            "{NAME}: q is {:?}, k {:?} and v {:?}; convert them to one dtype",
            q.dtype(),
            k.dtype(),
            v.dtype()
        )
    }
    let sequences = Sequence::unpack(q_lens, k_lens)?;
    let (q_sum, k_sum) = (q_lens.iter().sum::<usize>(), k_lens.iter().sum::<usize>());
    if q_sum != tokens || k_sum != keys {
        bail!(
            "{NAME}: q {:?} has {tokens} tokens, but q_lens {q_lens:?} sum to {q_sum}; \
             k {:?} has {keys}, and k_lens {k_lens:?} sum to {k_sum}",
            q.shape(),
            k.shape()
        )
    }
    if q.device().is_cpu() {
        let op = cpu::CausalAttention::new(sequences, scale);
        q.contiguous()?
            .apply_op3(&k.contiguous()?, &v.contiguous()?, op)
    } else {
        composed::causal_attention(q, k, v, &sequences, scale)
    }
}

const NAME: &str = "causal-attention";

/// Where a sequence lies in the packed tensors.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    q_start: usize,
    q_len: usize,
    k_start: usize,
    k_len: usize,
}

impl Sequence {
    fn unpack(q_lens: &[usize], k_lens: &[usize]) -> Result<Vec<Self>> {
        if q_lens.len() != k_lens.len() {
            bail!(
                "{NAME}: q_lens {q_lens:?} are {} sequences and k_lens {k_lens:?} are {}",
                q_lens.len(),
                k_lens.len()
            )
        }
        let (mut q_start, mut k_start) = (0, 0);
        let mut sequences = Vec::with_capacity(q_lens.len());
        for (i, (&q_len, &k_len)) in q_lens.iter().zip(k_lens).enumerate() {
            if q_len > k_len {
                bail!(
                    "{NAME}: sequence {i} has {q_len} queries but only {k_len} keys; its queries \
                     are its last positions"
                )
            }
            sequences.push(Self {
                q_start,
                q_len,
                k_start,
                k_len,
            });
            q_start += q_len;
            k_start += k_len;
        }
        Ok(sequences)
    }

    /// How many keys the first query sees besides its own.
    fn past(&self) -> usize {
        self.k_len - self.q_len
    }
}
