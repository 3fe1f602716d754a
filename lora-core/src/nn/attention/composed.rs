//! Attention from candle's ops, for devices without a fused op.

use candle_core::{D, DType, Result, Tensor};

use super::Sequence;

pub(super) fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &[Sequence],
    scale: f64,
) -> Result<Tensor> {
    let dtype = q.dtype();
    let internal = match dtype {
        DType::BF16 | DType::F16 => DType::F32,
        dtype => dtype,
    };
    let (_, heads, dim) = q.dims3()?;
    let kv_heads = k.dim(1)?;
    let group = heads / kv_heads;
    // [heads, tokens, dim] of one sequence
    let by_head = |xs: &Tensor, start: usize, len: usize| {
        let xs = xs.narrow(0, start, len)?.to_dtype(internal)?;
        xs.transpose(0, 1)?.contiguous()
    };
    let mut outputs = Vec::with_capacity(sequences.len());
    for seq in sequences.iter().filter(|seq| seq.q_len > 0) {
        // The query heads of one key head become more rows of it.
        let q = by_head(q, seq.q_start, seq.q_len)?;
        let q = q.reshape((kv_heads, group * seq.q_len, dim))?;
        let k = by_head(k, seq.k_start, seq.k_len)?;
        let v = by_head(v, seq.k_start, seq.k_len)?;
        let scores = (q.matmul(&k.t()?)? * scale)?; // [kv_heads, group * q_len, k_len]
        let scores = scores.broadcast_add(&mask(seq, group, &scores)?)?;
        let ys = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        let ys = ys.reshape((heads, seq.q_len, dim))?.transpose(0, 1)?;
        outputs.push(ys.to_dtype(dtype)?);
    }
    if outputs.is_empty() {
        return q.zeros_like();
    }
    Tensor::cat(&outputs, 0)
}

/// 0 for the keys that a query sees, -∞ for the others: `[group * q_len, k_len]`.
fn mask(seq: &Sequence, group: usize, like: &Tensor) -> Result<Tensor> {
    let rows = (0..group).flat_map(|_| 0..seq.q_len);
    let mask: Vec<f32> = rows
        .flat_map(|row| {
            let seen = seq.past() + row;
            (0..seq.k_len).map(move |key| if key <= seen { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Tensor::from_vec(mask, (group * seq.q_len, seq.k_len), like.device())?.to_dtype(like.dtype())
}
