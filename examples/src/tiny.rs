//! A model of a few thousand random parameters, as a GGUF file; for tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::Tensor;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file;
use candle_core::quantized::gguf_file::Value;
use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const HIDDEN: usize = 32;
const INNER: usize = 48;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const LAYERS: usize = 2;
const TOKENS: [&str; 12] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "a",
    "b",
    "c",
    "Ġ",
    "1",
    "2",
    "ab",
    "Ġc",
    "Ċ",
];

/// Random weights under Hugging Face's names; the head is tied.
pub fn weights() -> BTreeMap<String, Tensor> {
    let mut shapes = vec![
        ("model.embed_tokens".to_string(), vec![TOKENS.len(), HIDDEN]),
        ("model.norm".to_string(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let weight = |(name, shape): (String, Vec<usize>)| {
        let n = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..n).map(|_| rng.random_range(-0.3..0.3)).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (format!("{name}.weight"), tensor)
    };
    shapes.into_iter().map(weight).collect()
}

/// Writes the model as llama.cpp would, q and k interleaved.
pub fn write_gguf(path: &Path) {
    let text = |text: &str| Value::String(text.into());
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|t| text(t)).collect());
    let types = (0..TOKENS.len()).map(|i| Value::I32(if i < 3 { 3 } else { 1 }));
    let metadata = [
        ("general.architecture", text("llama")),
        ("llama.block_count", Value::U32(LAYERS as u32)),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(INNER as u32)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(100.)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", texts(&TOKENS)),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.merges", texts(&["a b", "Ġ c"])),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        (
            "tokenizer.chat_template",
            text(
                "{% for m in messages %}{{ '<|im_start|>' + m['content'].strip() + '<|im_end|>' }}\
                 {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
            ),
        ),
    ];
    let tensors = weights().into_iter().map(|(name, tensor)| {
        let tensor = match () {
            () if name.contains("q_proj") => interleave(&tensor, HEADS),
            () if name.contains("k_proj") => interleave(&tensor, KV_HEADS),
            () => tensor,
        };
        let mut gguf_name = name.replace("model.layers.", "blk.");
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
        ] {
            gguf_name = gguf_name.replace(from, to);
        }
        (
            gguf_name,
            QTensor::quantize(&tensor, GgmlDType::F32).unwrap(),
        )
    });
    let tensors: Vec<(String, QTensor)> = tensors.collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// llama.cpp's order: row `2 i + half` of a head was row `half * head_dim / 2 + i`.
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let rows = (0..heads * HEAD_DIM).map(|row| {
        let (head, place) = (row / HEAD_DIM, row % HEAD_DIM);
        (head * HEAD_DIM + place % 2 * HEAD_DIM / 2 + place / 2) as u32
    });
    let rows = Tensor::from_iter(rows, &Device::Cpu).unwrap();
    tensor.index_select(&rows, 0).unwrap()
}
