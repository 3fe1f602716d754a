//! The encoder and its classifier, under Hugging Face's names.

use candle_core::Module;
use candle_core::Result;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use lora_core::LoraTargets;
use lora_core::nn::Embedding;
use lora_core::nn::LayerNorm;
use lora_core::nn::Linear;
use lora_core::nn::embedding;
use lora_core::nn::layer_norm;
use lora_core::nn::linear;
use lora_core::nn::softmax_last_dim;

use super::Config;

/// An encoder and a linear layer over its pooled output.
#[derive(LoraTargets)]
pub struct BertForSequenceClassification {
    bert: BertModel,
    #[lora(head)]
    classifier: Linear,
}

impl BertForSequenceClassification {
    /// Builds the model from weights under `bert` and `classifier`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape; the error names it.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            bert: BertModel::new(cfg, vb.pp("bert"))?,
            classifier: linear(cfg.hidden_size, cfg.num_labels(), vb.pp("classifier"))?,
        })
    }

    /// Class scores `[batch, labels]`; arguments as in [`BertModel::forward`].
    ///
    /// # Errors
    /// As [`BertModel::forward`], or if the model has no pooler.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let hidden = self.bert.forward(ids, mask)?;
        self.classifier.forward(&self.bert.pooled(&hidden)?)
    }
}

/// Embeddings and layers, and a pooler where the weights have one.
#[derive(LoraTargets)]
pub struct BertModel {
    embeddings: Embeddings,
    encoder: Encoder,
    pooler: Option<Pooler>,
}

impl BertModel {
    /// Builds the model from weights under Hugging Face's names.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape; the error names it.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let pooler = vb.pp("pooler.dense");
        let has_pooler = pooler.contains_tensor("weight");
        Ok(Self {
            embeddings: Embeddings::new(cfg, vb.pp("embeddings"))?,
            encoder: Encoder::new(cfg, vb.pp("encoder"))?,
            pooler: has_pooler
                .then(|| linear(cfg.hidden_size, cfg.hidden_size, pooler))
                .transpose()?
                .map(|dense| Pooler { dense }),
        })
    }

    /// Hidden states `[batch, tokens, hidden]` of token ids `[batch, tokens]`.
    ///
    /// `mask` `[batch, tokens]` is 1 at tokens and 0 at padding; without it all are tokens.
    ///
    /// # Errors
    /// If an id is unknown, or a sequence is longer than the model's context.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let xs = self.embeddings.forward(ids)?;
        let dtype = xs.dtype();
        let bias = mask.map(|mask| {
            // 0 at tokens; at padding the least number, so that softmax gives it no weight.
            let least = if dtype.size_in_bytes() == 2 {
                -65504.
            } else {
                f64::from(f32::MIN)
            };
            let padding = mask.to_dtype(dtype)?.affine(-1., 1.)?;
            padding.affine(least, 0.)?.unsqueeze(1)?.unsqueeze(1) // [batch, 1, 1, tokens]
        });
        self.encoder.forward(&xs, bias.transpose()?.as_ref())
    }

    /// What the pooler makes of the first token, `[batch, hidden]`.
    ///
    /// # Errors
    /// If the model has no pooler.
    pub fn pooled(&self, hidden: &Tensor) -> Result<Tensor> {
        let Some(pooler) = &self.pooler else {
            candle_core::bail!("the weights have no `pooler.dense`")
        };
        let first = hidden.narrow(1, 0, 1)?.squeeze(1)?;
        pooler.dense.forward(&first)?.tanh()
    }
}

#[derive(LoraTargets)]
struct Embeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    #[lora(rename = "LayerNorm")]
    layer_norm: LayerNorm,
}

impl Embeddings {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let table = |rows, name| embedding(rows, cfg.hidden_size, vb.pp(name));
        Ok(Self {
            word_embeddings: table(cfg.vocab_size, "word_embeddings")?,
            position_embeddings: table(cfg.max_position_embeddings, "position_embeddings")?,
            token_type_embeddings: table(cfg.type_vocab_size, "token_type_embeddings")?,
            layer_norm: norm(cfg, vb.pp("LayerNorm"))?,
        })
    }

    /// `[batch, tokens, hidden]` of `ids` `[batch, tokens]`, all of the first segment.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, tokens) = ids.dims2()?;
        let longest = self.position_embeddings.embeddings().dim(0)?;
        if tokens > longest {
            candle_core::bail!("{tokens} tokens are more than the model's {longest}")
        }
        let positions = Tensor::arange(0, tokens as u32, ids.device())?;
        let segment = Tensor::zeros(1, candle_core::DType::U32, ids.device())?;
        let xs = self.word_embeddings.forward(ids)?;
        let xs = xs.broadcast_add(&self.position_embeddings.forward(&positions)?)?;
        let xs = xs.broadcast_add(&self.token_type_embeddings.forward(&segment)?)?;
        self.layer_norm.forward(&xs)
    }
}

#[derive(LoraTargets)]
struct Encoder {
    layer: Vec<Layer>,
}

impl Encoder {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let layer = (0..cfg.num_hidden_layers).map(|i| Layer::new(cfg, vb.pp("layer").pp(i)));
        Ok(Self {
            layer: layer.collect::<Result<_>>()?,
        })
    }

    fn forward(&self, xs: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        self.layer
            .iter()
            .try_fold(xs.clone(), |xs, layer| layer.forward(&xs, mask))
    }
}

#[derive(LoraTargets)]
struct Layer {
    attention: Attention,
    intermediate: Dense,
    output: Residual,
}

impl Layer {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            attention: Attention {
                attend: SelfAttention::new(cfg, vb.pp("attention.self"))?,
                output: Residual::new(cfg, cfg.hidden_size, vb.pp("attention.output"))?,
            },
            intermediate: Dense {
                dense: linear(
                    cfg.hidden_size,
                    cfg.intermediate_size,
                    vb.pp("intermediate.dense"),
                )?,
            },
            output: Residual::new(cfg, cfg.intermediate_size, vb.pp("output"))?,
        })
    }

    fn forward(&self, xs: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let attended = self.attention.attend.forward(xs, mask)?;
        let xs = self.attention.output.forward(&attended, xs)?;
        let inner = self.intermediate.dense.forward(&xs)?.gelu_erf()?;
        self.output.forward(&inner, &xs)
    }
}

#[derive(LoraTargets)]
struct Attention {
    #[lora(rename = "self")]
    attend: SelfAttention,
    output: Residual,
}

#[derive(LoraTargets)]
struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    heads: usize,
}

impl SelfAttention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let projection = |name| linear(cfg.hidden_size, cfg.hidden_size, vb.pp(name));
        Ok(Self {
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            heads: cfg.num_attention_heads,
        })
    }

    fn forward(&self, xs: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, hidden) = xs.dims3()?;
        let width = hidden / self.heads;
        // [batch, heads, tokens, width]
        let split = |projection: &Linear| {
            let ys = projection.forward(xs)?;
            ys.reshape((batch, tokens, self.heads, width))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (q, k, v) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let mut scores = (q.matmul(&k.t()?)? / (width as f64).sqrt())?;
        if let Some(mask) = mask {
            scores = scores.broadcast_add(mask)?;
        }
        let attended = softmax_last_dim(&scores)?.matmul(&v)?;
        attended.transpose(1, 2)?.reshape((batch, tokens, hidden))
    }
}

#[derive(LoraTargets)]
struct Dense {
    dense: Linear,
}

/// `LayerNorm(dense(xs) + residual)`: the end of both halves of a layer.
#[derive(LoraTargets)]
struct Residual {
    dense: Linear,
    #[lora(rename = "LayerNorm")]
    layer_norm: LayerNorm,
}

impl Residual {
    fn new(cfg: &Config, width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            dense: linear(width, cfg.hidden_size, vb.pp("dense"))?,
            layer_norm: norm(cfg, vb.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, xs: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.layer_norm
            .forward(&(self.dense.forward(xs)? + residual)?)
    }
}

#[derive(LoraTargets)]
struct Pooler {
    dense: Linear,
}

fn norm(cfg: &Config, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(cfg.hidden_size, cfg.layer_norm_eps, vb)
}
