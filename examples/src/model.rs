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
use candle_nn::VarBuilder;
use lora_core::LoraTargets;
use lora_core::nn::Embedding;
use lora_core::nn::Linear;
use lora_core::nn::RmsNorm;
use lora_core::nn::causal_attention;
use lora_core::nn::embedding;
use lora_core::nn::forward_shared;
use lora_core::nn::linear_b;
use lora_core::nn::rms_norm;
use lora_core::nn::rope_thd;
use lora_core::nn::swiglu;

use crate::config::AttentionBias;
use crate::config::Config;

/// A decoder and its output head.
#[derive(LoraTargets)]
pub struct CausalLm {
    model: Decoder,
    #[lora(head)]
    lm_head: Linear,
    #[lora(skip)]
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
    /// One layer: keys, values, `[tokens, kv_heads, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// Appends to layer `layer` and returns all its keys and values.
    fn append(&mut self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        match self.layers.get_mut(layer) {
            Some((ks, vs)) => {
                *ks = Tensor::cat(&[&*ks, &k], 0)?;
                *vs = Tensor::cat(&[&*vs, &v], 0)?;
            }
            None => self.layers.push((k, v)),
        }
        Ok(self.layers[layer].clone())
    }
}

#[derive(LoraTargets)]
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

#[derive(LoraTargets)]
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

#[derive(LoraTargets)]
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
        let rotate = |xs: Tensor| rope_thd(&xs.unsqueeze(0)?, cos, sin)?.squeeze(0);
        let [q, k, v] = forward_shared([&self.q_proj, &self.k_proj, &self.v_proj], xs)?;
        let (q, k) = (rotate(self.heads(q)?)?, rotate(self.heads(k)?)?);
        let v = self.heads(v)?;
        let scale = 1. / (self.head_dim as f64).sqrt();
        let attended = match cache {
            Some((cache, layer)) => {
                let (k, v) = cache.append(layer, k, v)?;
                causal_attention(&q, &k, &v, packing.lengths, &[k.dim(0)?], scale)?
            }
            None => causal_attention(&q, &k, &v, packing.lengths, packing.lengths, scale)?,
        };
        self.o_proj.forward(&attended.flatten_from(1)?)
    }

    /// Splits the heads: `[tokens, heads, head_dim]`.
    fn heads(&self, ys: Tensor) -> Result<Tensor> {
        let (tokens, width) = ys.dims2()?;
        ys.reshape((tokens, width / self.head_dim, self.head_dim))
    }
}

#[derive(LoraTargets)]
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
        let [gate, up] = forward_shared([&self.gate_proj, &self.up_proj], xs)?;
        let gated = swiglu(&gate, &up)?;
        self.down_proj.forward(&gated)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::greedy;
    use crate::pretrained::Pretrained;
    use crate::tiny;

    fn model() -> CausalLm {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let pretrained = Pretrained::open(&path).unwrap();
        pretrained.load(DType::F32, &Device::Cpu).unwrap()
    }

    fn hidden(model: &CausalLm, ids: &[u32], lengths: &[usize]) -> Tensor {
        let ids = Tensor::new(ids, &Device::Cpu).unwrap();
        model.hidden_states(&ids, lengths).unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        assert!(
            difference.to_scalar::<f32>().unwrap() < 1e-5,
            "{difference}"
        );
    }

    #[test]
    fn packed_sequences_do_not_see_each_other() {
        let model = model();
        let packed = hidden(&model, &[3, 4, 5, 9, 10], &[3, 2]);
        assert_close(
            &packed.narrow(0, 0, 3).unwrap(),
            &hidden(&model, &[3, 4, 5], &[3]),
        );
        assert_close(
            &packed.narrow(0, 3, 2).unwrap(),
            &hidden(&model, &[9, 10], &[2]),
        );
    }

    #[test]
    fn the_cache_gives_what_the_whole_sequence_gives() {
        let model = model();
        let mut cache = KvCache::default();
        let ids = [3, 4, 5, 9, 10, 7];
        let parts = [&ids[..3], &ids[3..4], &ids[4..]].map(|part| {
            let part = Tensor::new(part, &Device::Cpu).unwrap();
            model.continue_sequence(&part, &mut cache).unwrap()
        });
        assert_close(
            &Tensor::cat(&parts, 0).unwrap(),
            &hidden(&model, &ids, &[6]),
        );
    }

    #[test]
    fn generation_stops_at_the_end_of_the_context() {
        let made = greedy(&model(), &[3; 60], 100, &[], |_| {}).unwrap();
        assert_eq!(made.len(), 4);
        let ids = Tensor::new(&[3u32; 65], &Device::Cpu).unwrap();
        let error = model().hidden_states(&ids, &[65]).unwrap_err().to_string();
        assert!(
            error.contains("longer than the model's 64 tokens"),
            "{error}"
        );
    }
}
