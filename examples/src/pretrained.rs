//! A model on the disk, in either of the two forms, behind one door.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::Device;
use candle_core::Tensor;
use serde_json::json;
use std::collections::BTreeMap;

use crate::Error;
use crate::Result;
use crate::config::Config;
use crate::files;
use crate::gguf::Gguf;
use crate::hf_folder;
use crate::hf_folder::HfFolder;
use crate::model::CausalLm;
use crate::tokenizer::TextTokenizer;
use crate::weights;
use crate::weights::Weights;

/// Configuration, tokenizer and (unread) weights of a model.
pub struct Pretrained {
    /// Shapes and constants.
    pub config: Config,
    /// Its tokenizer.
    pub tokenizer: TextTokenizer,
    /// Its tensors, read on demand.
    pub weights: Arc<dyn Weights>,
}

impl Pretrained {
    /// Opens a `.gguf` file or a Hugging Face folder.
    ///
    /// # Errors
    /// If a file is missing, damaged or of an unsupported kind; the error names it.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let config = HfFolder::read_config(path)?;
            let tokenizer = TextTokenizer::from_folder(path, &config)?;
            return Ok(Self {
                config,
                tokenizer,
                weights: Arc::new(HfFolder::open(path)?),
            });
        }
        if !path.exists() {
            return Err(Error::model(path, "no such file or folder"));
        }
        let gguf = Gguf::open(path)?;
        let config = gguf.config().clone();
        let tokenizer = TextTokenizer::from_gguf(gguf.content(), &config)?;
        Ok(Self {
            config,
            tokenizer,
            weights: Arc::new(gguf),
        })
    }

    /// Builds the model in `dtype` on `dev`.
    pub fn load(&self, dtype: DType, dev: &Device) -> Result<CausalLm> {
        let vb = weights::var_builder(self.weights.clone(), dtype, dev);
        CausalLm::new(&self.config, vb)
    }

    /// Writes a Hugging Face folder in which the tensors of `replaced` stand for the stored ones.
    ///
    /// # Errors
    /// If the folder cannot be written, or a replaced tensor has another shape.
    pub fn save_folder(
        &self,
        dir: &Path,
        replaced: &BTreeMap<String, Tensor>,
        dtype: DType,
    ) -> Result<()> {
        files::create_dir(dir)?;
        let mut names = self.weights.names();
        names.extend(replaced.keys().cloned());
        names.sort_unstable();
        names.dedup();
        let shape = |name: &String| {
            let replaced = replaced.get(name).map(|tensor| tensor.shape().clone());
            replaced
                .or_else(|| self.weights.shape(name))
                .map(|shape| (name.clone(), shape))
        };
        let tensors: Vec<_> = names.iter().filter_map(shape).collect();
        hf_folder::write_safetensors(&dir.join("model.safetensors"), &tensors, dtype, |name| {
            replaced
                .get(name)
                .map_or_else(|| self.weights.load(name), |tensor| Ok(tensor.clone()))
        })?;
        self.tokenizer.save(dir)?;
        let name = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F64 => "float64",
            _ => "float32",
        };
        let tied = self.config.tie_word_embeddings && !replaced.contains_key("lm_head.weight");
        write_json(
            &dir.join("config.json"),
            &self.config.to_json(tied, name).into(),
        )?;
        let generation = json!({ "eos_token_id": self.config.eos_token_ids });
        write_json(&dir.join("generation_config.json"), &generation)
    }
}

fn write_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(json).map_err(|source| Error::Json {
        path: path.into(),
        source,
    })?;
    files::write_bytes(path, &text)
}
