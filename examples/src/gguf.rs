//! GGUF files of the Llama family: dequantised, under Hugging Face's names.
//!
//! Three things differ from a Hugging Face folder: tensor names; the rows of q and k, which
//! llama.cpp stores with the two halves of each head interleaved (`[heads, head_dim / 2, 2]` for
//! `[heads, 2, head_dim / 2]`); and the configuration and tokenizer, which are metadata.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use candle_core::Device;
use candle_core::Shape;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::gguf_file::Value;
use serde_json::json;

use crate::Error;
use crate::Result;
use crate::config::Architecture;
use crate::config::Config;
use crate::weights::Weights;

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    file: Mutex<File>,
    content: Content,
    config: Config,
    /// Hugging Face name -> GGUF name.
    names: BTreeMap<String, String>,
}

impl Gguf {
    /// Reads the metadata and the table of tensors.
    ///
    /// # Errors
    /// If the file is damaged, of another architecture, or needs something that the model does
    /// not have; the error names the metadata key or the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let content = Content::read(&mut file)
            .map_err(|e| Error::model(path, format!("not a readable GGUF file: {e}")))?;
        let mut names = BTreeMap::new();
        for name in content.tensor_infos.keys() {
            let hf = hf_name(name).ok_or_else(|| {
                Error::model(
                    path,
                    format!(
                        "tensor `{name}` has no place in this model; use the Hugging Face folder"
                    ),
                )
            })?;
            names.insert(hf, name.clone());
        }
        let config = config(&content, names.contains_key("lm_head.weight"))?;
        Ok(Self {
            path: path.into(),
            file: Mutex::new(file),
            content,
            config,
            names,
        })
    }

    /// The configuration, as a Hugging Face one.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Metadata, tokenizer included.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Number of heads whose rows llama.cpp interleaved in this tensor, if it did.
    fn interleaved_heads(&self, hf_name: &str) -> Option<usize> {
        let llama = self.config.architecture == Architecture::Llama;
        if llama && hf_name.contains(".q_proj.") {
            Some(self.config.num_attention_heads)
        } else if llama && hf_name.contains(".k_proj.") {
            Some(self.config.num_key_value_heads)
        } else {
            None
        }
    }
}

impl Weights for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Shape> {
        let info = self.content.tensor_infos.get(self.names.get(name)?)?;
        Some(info.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let absent = || Error::model(&self.path, format!("there is no tensor `{name}`"));
        let gguf_name = self.names.get(name).ok_or_else(absent)?;
        // A reader that panicked left nothing behind: every read seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let tensor = self.content.tensor(&mut *file, gguf_name, &Device::Cpu)?;
        let tensor = tensor.dequantize(&Device::Cpu)?;
        match self.interleaved_heads(name) {
            Some(heads) => Ok(deinterleave(&tensor, heads)?),
            None => Ok(tensor),
        }
    }
}

/// Rows of each head from llama.cpp's order to Hugging Face's.
fn deinterleave(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let rows = tensor.dim(0)?;
    tensor
        .reshape((heads, rows / heads / 2, 2, tensor.elem_count() / rows))?
        .transpose(1, 2)? // [heads, 2, head_dim / 2, in]
        .contiguous()?
        .reshape(tensor.shape())
}

fn hf_name(name: &str) -> Option<String> {
    let (stem, kind) = name
        .rsplit_once('.')
        .filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let hf = match stem
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((layer, part)) => {
            let part = match part {
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                "attn_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                _ => return None,
            };
            format!("model.layers.{layer}.{part}.{kind}")
        }
        None => match stem {
            "token_embd" => format!("model.embed_tokens.{kind}"),
            "output_norm" => format!("model.norm.{kind}"),
            "output" => format!("lm_head.{kind}"),
            _ => return None,
        },
    };
    Some(hf)
}

fn config(content: &Content, has_head: bool) -> Result<Config> {
    let architecture = text(content, "general.architecture")?;
    let architecture = match architecture.as_str() {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        _ => {
            return Err(Error::Architecture {
                found: architecture,
            });
        }
    };
    let prefix = match architecture {
        Architecture::Qwen2 => "qwen2",
        _ => "llama",
    };
    let key = |name: &str| format!("{prefix}.{name}");
    let scaling = key("rope.scaling.type");
    if content.metadata.contains_key(&scaling) && text(content, &scaling)? != "none" {
        return Err(Error::config(
            scaling,
            "is set; use the model's Hugging Face folder",
        ));
    }
    if content.metadata.contains_key(&key("expert_count")) {
        return Err(Error::config(
            key("expert_count"),
            "is set; mixtures of experts are not supported",
        ));
    }
    let heads = number(content, &key("attention.head_count"))?;
    let hidden = number(content, &key("embedding_length"))?;
    let optional = |name: &str, default: u64| match content.metadata.contains_key(&key(name)) {
        true => number(content, &key(name)),
        false => Ok(default),
    };
    let embedding = content.tensor_infos.get("token_embd.weight");
    let vocab = embedding.and_then(|info| info.shape.dims().first().copied());
    let has_bias = |name: &str| content.tensor_infos.contains_key(name);
    let token = |name: &str| number(content, &format!("tokenizer.ggml.{name}_token_id")).ok();
    let json = json!({
        "architectures": [architecture.class_name()],
        "model_type": architecture.model_type(),
        "hidden_act": "silu",
        "vocab_size": vocab.ok_or_else(|| Error::config("token_embd.weight", "is missing"))?,
        "hidden_size": hidden,
        "intermediate_size": number(content, &key("feed_forward_length"))?,
        "num_hidden_layers": number(content, &key("block_count"))?,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads)?,
        "head_dim": optional("attention.key_length", hidden / heads.max(1))?,
        "max_position_embeddings": number(content, &key("context_length"))?,
        // stored as f32: 1e-5 must not come back as 9.999999747e-6
        "rms_norm_eps": float(content, &key("attention.layer_norm_rms_epsilon"))?,
        "rope_theta": match content.metadata.contains_key(&key("rope.freq_base")) {
            true => float(content, &key("rope.freq_base"))?,
            false => 10_000.,
        },
        "attention_bias": has_bias("blk.0.attn_q.bias"),
        "mlp_bias": has_bias("blk.0.ffn_up.bias"),
        "tie_word_embeddings": !has_head,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
    });
    match json {
        serde_json::Value::Object(json) => Config::from_json(json),
        _ => unreachable!("json! was given an object"),
    }
}

/// The value of a metadata key.
///
/// # Errors
/// [`Error::Config`] naming the key.
pub(crate) fn value<'a>(content: &'a Content, key: &str) -> Result<&'a Value> {
    content
        .metadata
        .get(key)
        .ok_or_else(|| Error::config(key, "is missing"))
}

/// A text value.
pub(crate) fn text(content: &Content, key: &str) -> Result<String> {
    let value = value(content, key)?.to_string();
    value
        .cloned()
        .map_err(|_| Error::config(key, "is not a text"))
}

/// A whole number of any width.
pub(crate) fn number(content: &Content, key: &str) -> Result<u64> {
    value(content, key)?
        .to_u64()
        .or_else(|_| match value(content, key)? {
            Value::I32(n) if *n >= 0 => Ok(*n as u64),
            Value::I64(n) if *n >= 0 => Ok(*n as u64),
            _ => Err(Error::config(key, "is not a whole number")),
        })
}

fn float(content: &Content, key: &str) -> Result<f64> {
    let number = value(content, key)?
        .to_f32()
        .map_err(|_| Error::config(key, "is not an f32"))?;
    // By way of the shortest decimal, which is what the f32 was written from.
    number
        .to_string()
        .parse()
        .map_err(|_| Error::config(key, "is not a number"))
}
