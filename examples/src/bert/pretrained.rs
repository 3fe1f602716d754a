//! A BERT model from a folder, whichever head it has.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::Device;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use lora_core::LoraTargets;

use super::BertForSequenceClassification;
use super::BertModel;
use super::Config;
use crate::Error;
use crate::Result;
use crate::hf_folder::HfFolder;
use crate::weights;
use crate::weights::Weights;

/// A BERT model, with or without a classifier. The paths of its layers are those that the same
/// class has in transformers: `bert.encoder..` under a classifier, `encoder..` without.
#[derive(LoraTargets)]
pub enum Bert {
    /// `BertModel`.
    Encoder(#[lora(flatten)] BertModel),
    /// `BertForSequenceClassification`.
    Classifier(#[lora(flatten)] BertForSequenceClassification),
}

impl Bert {
    /// Opens a model folder: a classifier if the folder has one, else the encoder. The encoder's
    /// weights may be stored with or without the prefix `bert.`.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the model is of another kind.
    pub fn open(dir: &Path, dtype: DType, dev: &Device) -> Result<Self> {
        let cfg = Config::read(dir)?;
        let class = cfg.architectures.first().map_or("BertModel", |class| class);
        if !class.starts_with("Bert") {
            return Err(Error::config(
                "architectures",
                format!("is {class}; supported are BERT models"),
            ));
        }
        let folder = Arc::new(HfFolder::open(dir)?);
        let prefixed = folder
            .shape("bert.embeddings.word_embeddings.weight")
            .is_some();
        let classifies = folder.shape("classifier.weight").is_some();
        let vb = weights::var_builder(folder, dtype, dev);
        if classifies && class == "BertForSequenceClassification" {
            return Ok(Self::Classifier(BertForSequenceClassification::new(
                &cfg, vb,
            )?));
        }
        Ok(Self::Encoder(BertModel::new(
            &cfg,
            if prefixed { under_bert(vb) } else { vb },
        )?))
    }

    /// Class scores `[batch, labels]`, or hidden states `[batch, tokens, hidden]` without a
    /// classifier. `ids` and `mask` are `[batch, tokens]`; `mask` is 0 at padding.
    ///
    /// # Errors
    /// As [`BertModel::forward`].
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
        match self {
            Self::Encoder(model) => model.forward(ids, mask),
            Self::Classifier(model) => model.forward(ids, mask),
        }
    }
}

/// Finds names under `bert.` while the layers keep the paths that they have in the model.
fn under_bert(vb: VarBuilder<'static>) -> VarBuilder<'static> {
    vb.rename_f(|name| format!("bert.{name}"))
}
