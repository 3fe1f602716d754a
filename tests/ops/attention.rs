//! `causal_attention`.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use lora_core::nn::causal_attention;

use crate::oracle::{
    assert_close, assert_gradients, assert_half_types, assert_same, random, randoms, strided,
    value_and_grads,
};

const SCALE: f64 = 0.3;

/// One sequence from candle's ops, head by head: q `[n, H, D]`, k and v `[m, Hkv, D]`.
fn slow_sequence(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let ((n, heads, _), (m, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let mut mask = vec![0f64; n * m];
    for (i, row) in mask.chunks_mut(m).enumerate() {
        row[m - n + i + 1..].fill(f64::NEG_INFINITY);
    }
    let mask = Tensor::from_vec(mask, (n, m), &Device::Cpu)?.to_dtype(q.dtype())?;
    let head = |xs: &Tensor, head: usize| xs.narrow(1, head, 1)?.squeeze(1)?.contiguous();
    let mut outputs = Vec::new();
    for h in 0..heads {
        let kv_head = h / (heads / kv_heads);
        let scores = (head(q, h)?.matmul(&head(k, kv_head)?.t()?)? * SCALE)?;
        let probs = candle_nn::ops::softmax(&(scores + &mask)?, D::Minus1)?;
        outputs.push(probs.matmul(&head(v, kv_head)?)?);
    }
    Tensor::stack(&outputs, 1)
}

fn slow(args: &[Tensor], q_lens: &[usize], k_lens: &[usize]) -> Result<Tensor> {
    let (mut q_start, mut k_start, mut outputs) = (0, 0, Vec::new());
    for (&n, &m) in q_lens.iter().zip(k_lens) {
        if n > 0 {
            let (k, v) = (
                args[1].narrow(0, k_start, m)?,
                args[2].narrow(0, k_start, m)?,
            );
            outputs.push(slow_sequence(&args[0].narrow(0, q_start, n)?, &k, &v)?);
        }
        (q_start, k_start) = (q_start + n, k_start + m);
    }
    Tensor::cat(&outputs, 0)
}

/// q, k and v.
fn qkv(q_lens: &[usize], k_lens: &[usize], heads: usize, kv_heads: usize, d: usize) -> Vec<Tensor> {
    let (n, m) = (q_lens.iter().sum::<usize>(), k_lens.iter().sum::<usize>());
    randoms(&[&[n, heads, d], &[m, kv_heads, d], &[m, kv_heads, d]])
}

fn fused(q_lens: &[usize], k_lens: &[usize]) -> impl Fn(&[Tensor]) -> Result<Tensor> {
    move |args| causal_attention(&args[0], &args[1], &args[2], q_lens, k_lens, SCALE)
}

#[test]
fn attention_equals_the_slow_composition() {
    // Lengths of queries, lengths of keys, heads, key heads, head dimension.
    type Case<'a> = (&'a [usize], &'a [usize], usize, usize, usize);
    let cases: [Case; 7] = [
        (&[1], &[1], 1, 1, 1),
        (&[5], &[5], 2, 2, 3),
        (&[7, 1, 4], &[7, 1, 4], 4, 2, 5),
        (&[33, 0, 16], &[33, 2, 16], 6, 2, 16), // over a block, an empty query, a full tile
        (&[70, 40], &[70, 40], 9, 3, 64),       // several threads
        (&[1, 1, 1], &[20, 1, 7], 9, 3, 8),     // one token each, with cached keys
        (&[4, 35], &[17, 50], 3, 1, 17),        // a block after cached keys
    ];
    for (q_lens, k_lens, heads, kv_heads, d) in cases {
        let inputs = qkv(q_lens, k_lens, heads, kv_heads, d);
        let slow = |args: &[Tensor]| slow(args, q_lens, k_lens);
        assert_same(&fused(q_lens, k_lens), &slow, &inputs, DType::F64, 1e-13);
        assert_same(&fused(q_lens, k_lens), &slow, &inputs, DType::F32, 1e-5);
    }
}

#[test]
fn attention_gradients_are_central_differences() {
    for (q_lens, k_lens) in [([6, 2], [6, 2]), ([1, 5], [4, 7])] {
        let inputs = qkv(&q_lens, &k_lens, 4, 2, 3);
        assert_gradients(&fused(&q_lens, &k_lens), &inputs);
    }
}

#[test]
fn attention_in_half_types_rounds_little() {
    // The gradient of q and k is made with the rounded result.
    assert_half_types(
        &fused(&[9, 3], &[9, 3]),
        &qkv(&[9, 3], &[9, 3], 4, 2, 8),
        4.0,
    );
}

#[test]
fn packed_sequences_equal_separate_ones() {
    let lens = [6, 1, 40];
    let inputs = qkv(&lens, &lens, 4, 2, 8);
    let (packed, packed_grads) = value_and_grads(&fused(&lens, &lens), &inputs);
    let separate = |args: &[Tensor]| {
        let mut start = 0;
        let outputs = lens.map(|len| {
            let part = |i: usize| args[i].narrow(0, start, len).unwrap();
            let ys = causal_attention(&part(0), &part(1), &part(2), &[len], &[len], SCALE);
            start += len;
            ys.unwrap()
        });
        Tensor::cat(&outputs, 0)
    };
    let (ys, grads) = value_and_grads(&separate, &inputs);
    assert_close("value", &packed, &ys, 0.0);
    for (packed, separate) in packed_grads.iter().zip(&grads) {
        assert_close("gradient", packed, separate, 0.0);
    }
}

#[test]
fn cached_keys_give_the_last_rows_of_the_whole() {
    let inputs = qkv(&[40, 9], &[40, 9], 4, 2, 8);
    let [q, k, v] = &inputs[..] else {
        unreachable!()
    };
    let whole = fused(&[40, 9], &[40, 9])(&inputs).unwrap();
    for (n, m) in [(1, 1), (3, 2), (33, 9)] {
        let last = |xs: &Tensor| {
            let parts = [
                xs.narrow(0, 40 - n, n).unwrap(),
                xs.narrow(0, 49 - m, m).unwrap(),
            ];
            Tensor::cat(&parts, 0).unwrap()
        };
        let ys = causal_attention(&last(q), k, v, &[n, m], &[40, 9], SCALE).unwrap();
        assert_close("last rows", &ys, &last(&whole), 1e-14);
    }
}

#[test]
fn a_later_token_changes_nothing_before_it() {
    let mut inputs = qkv(&[20], &[20], 2, 1, 8);
    let before = fused(&[20], &[20])(&inputs).unwrap();
    for xs in &mut inputs {
        let other = random(&[1, xs.dim(1).unwrap(), 8], 50);
        *xs = Tensor::cat(&[&xs.narrow(0, 0, 19).unwrap(), &other], 0).unwrap();
    }
    let after = fused(&[20], &[20])(&inputs).unwrap();
    let first = |xs: &Tensor| xs.narrow(0, 0, 19).unwrap();
    assert_close("earlier rows", &first(&after), &first(&before), 0.0);
}

#[test]
fn attention_takes_any_strides() {
    let turned = |args: &[Tensor]| {
        let args: Vec<_> = args.iter().map(strided).collect();
        fused(&[4, 3], &[5, 3])(&args)
    };
    let inputs = qkv(&[4, 3], &[5, 3], 4, 2, 8);
    assert_same(&turned, &fused(&[4, 3], &[5, 3]), &inputs, DType::F64, 0.0);
}

#[test]
fn attention_of_no_queries_is_empty_and_leaves_zero_gradients() {
    let (ys, grads) = value_and_grads(&fused(&[], &[]), &qkv(&[], &[], 4, 2, 8));
    assert_eq!(ys.dims(), [0, 4, 8]);
    assert_eq!(grads[1].dims(), [0, 2, 8]);
    let (ys, grads) = value_and_grads(&fused(&[0], &[3]), &qkv(&[0], &[3], 4, 2, 8));
    assert_eq!(ys.dims(), [0, 4, 8]);
    assert_close("dk", &grads[1], &grads[1].zeros_like().unwrap(), 0.0);
}

#[test]
fn only_tracked_inputs_get_gradients() {
    for tracked in 1..8 {
        let vars: Vec<Var> = (qkv(&[3], &[3], 2, 1, 4).iter())
            .map(|xs| Var::from_tensor(xs).unwrap())
            .collect();
        let inputs: Vec<Tensor> = (vars.iter().enumerate())
            .map(|(i, var)| match tracked >> i & 1 {
                1 => var.as_tensor().clone(),
                _ => var.as_detached_tensor(),
            })
            .collect();
        let ys = fused(&[3], &[3])(&inputs).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (i, input) in inputs.iter().enumerate() {
            assert_eq!(
                grads.get(input).is_some(),
                tracked >> i & 1 == 1,
                "input {i}"
            );
        }
    }
}

#[test]
fn shapes_and_lengths_that_do_not_fit_are_named() {
    let message = |inputs: &[Tensor], q_lens: &[usize], k_lens: &[usize]| {
        fused(q_lens, k_lens)(inputs).unwrap_err().to_string()
    };
    let inputs = qkv(&[4], &[4], 3, 2, 8);
    let error = message(&inputs, &[4], &[4]);
    assert!(
        error.contains("[4, 3, 8]") && error.contains("[4, 2, 8]"),
        "{error}"
    );
    let inputs = qkv(&[4], &[4], 4, 2, 8);
    let error = message(&inputs, &[3], &[4]);
    assert!(
        error.contains("4 tokens") && error.contains("sum to 3"),
        "{error}"
    );
    let error = message(&inputs, &[4], &[3, 1]);
    assert!(
        error.contains("1 sequences") && error.contains("are 2"),
        "{error}"
    );
    let error = message(&inputs, &[3, 1], &[4, 0]);
    assert!(
        error.contains("sequence 1") && error.contains("0 keys"),
        "{error}"
    );
}
