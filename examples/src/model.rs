//! The Llama decoder: Llama, SmolLM2, Mistral and Qwen2.5, by configuration.
//!
//! Sequences of different lengths are packed end to end, without padding: token ids are one flat
//! tensor and a list of lengths says where each sequence ends. The head is a separate call, so
//! that logits (`vocab_size` numbers a token) are computed only where they are wanted.

use candle_core::DType;
use candle_core::Device;
use candle_core::Module;
use candle_core::Result;
use candle_core::Tensor;
use candle_nn::Embedding;
use candle_nn::Linear;
use candle_nn::RmsNorm;
use candle_nn::VarBuilder;
use candle_nn::embedding;
use candle_nn::linear_b;
use candle_nn::ops::softmax_last_dim;
use candle_nn::rms_norm;
use candle_nn::rotary_emb::rope;

use crate::config::AttentionBias;
use crate::config::Config;

/// A decoder and its output head.
pub struct CausalLm {
    model: Decoder,
    lm_head: Linear,
    rotary: Rotary,
}

impl CausalLm {
    /// Builds the model from weights under Hugging Face's names.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape; the error names it.
    pub fn new(cfg: &Config, vb: VarBuilder) -> crate::Result<Self> {
        let rotary = Rotary {
            frequencies: cfg.rope_frequencies(),
            max_length: cfg.max_length,
            dtype: vb.dtype(),
            dev: vb.device().clone(),
        };
        let model = Decoder::new(cfg, vb.pp("model"))?;
        let lm_head = if cfg.tie_word_embeddings {
            Linear::new(model.embed_tokens.embeddings().clone(), None)
        } else {
            linear_b(cfg.hidden_size, cfg.vocab_size, false, vb.pp("lm_head"))?
        };
        Ok(Self {
            model,
            lm_head,
            rotary,
        })
    }

    /// Hidden states of packed sequences, after the last norm.
    ///
    /// `ids` is `[tokens]` and `lengths` sums to `tokens`; the result is `[tokens, hidden]`.
    ///
    /// # Errors
    /// If the lengths don't sum up, or a sequence is longer than the model's context.
    pub fn hidden_states(&self, ids: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let tokens = ids.dim(0)?;
        if lengths.iter().sum::<usize>() != tokens {
            candle_core::bail!("sequence lengths {lengths:?} do not sum to {tokens} tokens")
        }
        let positions = lengths.iter().flat_map(|length| 0..*length);
        let packing = Packing {
            rope: self.rotary.tables(positions)?,
            lengths,
        };
        self.model.forward(ids, &packing, None)
    }

    /// Hidden states `[tokens, hidden]` of tokens that continue the one sequence in `cache`.
    ///
    /// # Errors
    /// If the sequence gets longer than the model's context.
    pub fn continue_sequence(&self, ids: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let tokens = ids.dim(0)?;
        let positions = cache.length..cache.length + tokens;
        let packing = Packing {
            rope: self.rotary.tables(positions)?,
            lengths: &[tokens],
        };
        cache.length += tokens;
        self.model.forward(ids, &packing, Some(cache))
    }

    /// Logits `[n, vocab]` of hidden states `[n, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(hidden)
    }

    /// Longest sequence, in tokens.
    pub fn max_length(&self) -> usize {
        self.rotary.max_length
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.rotary.dev
    }
}

/// Keys and values of the tokens of one sequence so far.
#[derive(Default)]
pub struct KvCache {
    length: usize,
    /// One layer: keys, values, `[kv_heads, tokens, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// Appends to layer `layer` and returns all its keys and values.
    fn append(&mut self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        match self.layers.get_mut(layer) {
            Some((ks, vs)) => {
                *ks = Tensor::cat(&[&*ks, &k], 1)?;
                *vs = Tensor::cat(&[&*vs, &v], 1)?;
            }
            None => self.layers.push((k, v)),
        }
        Ok(self.layers[layer].clone())
    }
}

struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

impl Decoder {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            embed_tokens: embedding(cfg.vocab_size, cfg.hidden_size, vb.pp("embed_tokens"))?,
            layers: (0..cfg.num_hidden_layers)
                .map(|i| Layer::new(cfg, vb.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            norm: rms_norm(cfg.hidden_size, cfg.rms_norm_eps, vb.pp("norm"))?,
        })
    }

    fn forward(
        &self,
        ids: &Tensor,
        packing: &Packing,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let mut xs = self.embed_tokens.forward(ids)?; // [tokens, hidden]
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| (cache, i));
            xs = layer.forward(&xs, packing, cache)?;
        }
        self.norm.forward(&xs)
    }
}

struct Layer {
    self_attn: Attention,
    mlp: Mlp,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let norm = |name| rms_norm(cfg.hidden_size, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            self_attn: Attention::new(cfg, vb.pp("self_attn"))?,
            mlp: Mlp::new(cfg, vb.pp("mlp"))?,
            input_layernorm: norm("input_layernorm")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
        })
    }

    fn forward(
        &self,
        xs: &Tensor,
        packing: &Packing,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Result<Tensor> {
        let attended =
            self.self_attn
                .forward(&self.input_layernorm.forward(xs)?, packing, cache)?;
        let xs = (xs + attended)?;
        let mixed = self
            .mlp
            .forward(&self.post_attention_layernorm.forward(&xs)?)?;
        xs + mixed
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    head_dim: usize,
}

impl Attention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let hidden = cfg.hidden_size;
        let q = cfg.num_attention_heads * cfg.head_dim;
        let kv = cfg.num_key_value_heads * cfg.head_dim;
        let (qkv_bias, o_bias) = match cfg.attention_bias {
            AttentionBias::None => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::All => (true, true),
        };
        Ok(Self {
            q_proj: linear_b(hidden, q, qkv_bias, vb.pp("q_proj"))?,
            k_proj: linear_b(hidden, kv, qkv_bias, vb.pp("k_proj"))?,
            v_proj: linear_b(hidden, kv, qkv_bias, vb.pp("v_proj"))?,
            o_proj: linear_b(q, hidden, o_bias, vb.pp("o_proj"))?,
            head_dim: cfg.head_dim,
        })
    }

    fn forward(
        &self,
        xs: &Tensor,
        packing: &Packing,
        cache: Option<(&mut KvCache, usize)>,
    ) -> Result<Tensor> {
        let (cos, sin) = &packing.rope;
        let q = rope(&self.heads(&self.q_proj, xs)?, cos, sin)?.squeeze(0)?;
        let k = rope(&self.heads(&self.k_proj, xs)?, cos, sin)?.squeeze(0)?;
        let v = self.heads(&self.v_proj, xs)?.squeeze(0)?;
        let attended = match cache {
            Some((cache, layer)) => {
                let (k, v) = cache.append(layer, k, v)?;
                causal_attention(&q, &k, &v)?
            }
            None => {
                let mut start = 0;
                let mut sequences = Vec::with_capacity(packing.lengths.len());
                for &length in packing.lengths {
                    let of = |xs: &Tensor| xs.narrow(1, start, length)?.contiguous();
                    sequences.push(causal_attention(&of(&q)?, &of(&k)?, &of(&v)?)?);
                    start += length;
                }
                Tensor::cat(&sequences, 0)?
            }
        };
        self.o_proj.forward(&attended)
    }

    /// Projects `xs` and splits the heads: `[1, heads, tokens, head_dim]`.
    fn heads(&self, projection: &Linear, xs: &Tensor) -> Result<Tensor> {
        let ys = projection.forward(xs)?;
        let (tokens, width) = ys.dims2()?;
        let heads = width / self.head_dim;
        ys.reshape((1, tokens, heads, self.head_dim))?
            .transpose(1, 2)?
            .contiguous()
    }
}

/// Attention of one sequence, each token to itself and those before it.
///
/// `q` is `[heads, tokens, head_dim]`; `k` and `v` are `[kv_heads, all tokens, head_dim]`, the last
/// `tokens` of them belonging to `q`. Returns `[tokens, heads * head_dim]`.
fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (heads, tokens, head_dim) = q.dims3()?;
    let (kv_heads, all, _) = k.dims3()?;
    let group = heads / kv_heads; // query heads that share a key head
    let q = (q.reshape((kv_heads, group * tokens, head_dim))? / (head_dim as f64).sqrt())?;
    let scores = q.matmul(&k.t()?)?.reshape((heads, tokens, all))?;
    let scores = if tokens == 1 {
        scores
    } else {
        let mask = (0..tokens).flat_map(|i| {
            (0..all).map(move |j| {
                if j <= i + all - tokens {
                    0f32
                } else {
                    f32::NEG_INFINITY
                }
            })
        });
        let mask = Tensor::from_iter(mask, q.device())?.reshape((1, tokens, all))?;
        scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?
    };
    let weights = softmax_last_dim(&scores)?.reshape((kv_heads, group * tokens, all))?;
    weights
        .matmul(v)?
        .reshape((heads, tokens, head_dim))?
        .transpose(0, 1)?
        .reshape((tokens, heads * head_dim))
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
        Ok(Self {
            gate_proj: linear_b(hidden, inner, cfg.mlp_bias, vb.pp("gate_proj"))?,
            up_proj: linear_b(hidden, inner, cfg.mlp_bias, vb.pp("up_proj"))?,
            down_proj: linear_b(inner, hidden, cfg.mlp_bias, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let gate = self.gate_proj.forward(xs)?.silu()?;
        self.down_proj.forward(&(gate * self.up_proj.forward(xs)?)?)
    }
}

/// Where each sequence of a batch ends, and the rotary tables of its positions.
struct Packing<'a> {
    /// cos, sin, each `[tokens, head_dim / 2]`.
    rope: (Tensor, Tensor),
    lengths: &'a [usize],
}

struct Rotary {
    frequencies: Vec<f64>,
    max_length: usize,
    dtype: DType,
    dev: Device,
}

impl Rotary {
    fn tables(&self, positions: impl Iterator<Item = usize>) -> Result<(Tensor, Tensor)> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            if position >= self.max_length {
                candle_core::bail!(
                    "a sequence is longer than the model's {} tokens",
                    self.max_length
                )
            }
            for frequency in &self.frequencies {
                let angle = position as f64 * frequency;
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        let half = self.frequencies.len();
        let tensor = |values: Vec<f32>| {
            let shape = (values.len() / half, half);
            Tensor::from_vec(values, shape, &self.dev)?.to_dtype(self.dtype)
        };
        Ok((tensor(cos)?, tensor(sin)?))
    }
}
