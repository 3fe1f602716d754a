//! A model of either family from a Hugging Face folder, run on token ids alone.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::Device;
use candle_core::Tensor;
use lora_core::LoraTargets;

use crate::Error;
use crate::Result;
use crate::bert::Bert;
use crate::files;
use crate::hf_folder::HfFolder;
use crate::model::CausalLm;
use crate::weights;

/// A decoder of the Llama family or a BERT.
#[derive(LoraTargets)]
pub enum AnyModel {
    /// Llama, SmolLM2, Mistral, Qwen2.
    Llama(#[lora(flatten)] CausalLm),
    /// BERT, with or without a classifier.
    Bert(#[lora(flatten)] Bert),
}

impl AnyModel {
    /// Opens a model folder.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the model is of another family.
    pub fn open(dir: &Path, dtype: DType, dev: &Device) -> Result<Self> {
        let path = dir.join("config.json");
        let json = files::read_json(&path)?.ok_or_else(|| Error::model(&path, "no such file"))?;
        if json.get("model_type").and_then(|kind| kind.as_str()) == Some("bert") {
            return Bert::open(dir, dtype, dev).map(Self::Bert);
        }
        let config = HfFolder::read_config(dir)?;
        let vb = weights::var_builder(Arc::new(HfFolder::open(dir)?), dtype, dev);
        CausalLm::new(&config, vb).map(Self::Llama)
    }

    /// Logits `[batch, tokens, vocab]` of a decoder, hidden states `[batch, tokens, hidden]` of an
    /// encoder, scores `[batch, labels]` of a classifier.
    ///
    /// `ids` is `[batch, tokens]`; so is `mask`, which is 0 at padding and which a decoder has no
    /// use for.
    ///
    /// # Errors
    /// If an id is unknown, or there are more tokens than the model can take.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let ids = ids.to_dtype(DType::U32)?;
        match self {
            Self::Bert(model) => model.forward(&ids, mask),
            Self::Llama(model) => {
                let (batch, tokens) = ids.dims2()?;
                let hidden = model.hidden_states(&ids.flatten_all()?, &vec![tokens; batch])?;
                model.logits(&hidden)?.reshape((batch, tokens, ()))
            }
        }
    }
}
