//! A model on the disk, in either of the two forms, behind one door.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::Device;
use candle_core::Tensor;
use serde_json::json;

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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tiny;

    fn logits(pretrained: &Pretrained) -> Vec<Vec<f32>> {
        let model = pretrained.load(DType::F32, &Device::Cpu).unwrap();
        let ids = Tensor::new(&[3u32, 9, 10, 7, 8], &Device::Cpu).unwrap();
        let hidden = model.hidden_states(&ids, &[5]).unwrap();
        model.logits(&hidden).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn a_gguf_file_has_the_weights_it_was_made_from() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let pretrained = Pretrained::open(&path).unwrap();
        let weights = tiny::weights();
        assert_eq!(
            pretrained.weights.names(),
            weights.keys().cloned().collect::<Vec<_>>()
        );
        for (name, tensor) in weights {
            let loaded = pretrained.weights.load(&name).unwrap();
            assert_eq!(loaded.dims(), tensor.dims(), "{name}");
            let difference = (loaded - tensor).unwrap().abs().unwrap().max_all().unwrap();
            assert_eq!(difference.to_scalar::<f32>().unwrap(), 0., "{name}");
        }
        assert!(pretrained.config.tie_word_embeddings);
        assert_eq!(pretrained.config.rms_norm_eps, 1e-5);
    }

    #[test]
    fn a_saved_folder_answers_as_the_gguf_file_does_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let gguf = Pretrained::open(&path).unwrap();
        let folder = dir.path().join("folder");
        gguf.save_folder(&folder, &BTreeMap::new(), DType::F32)
            .unwrap();
        let saved = Pretrained::open(&folder).unwrap();
        assert_eq!(logits(&saved), logits(&gguf));
        let text = "ab c12ab";
        let ids = gguf.tokenizer.encode_start(text).unwrap();
        assert_eq!(
            ids,
            [9, 10, 7, 8, 9],
            "digits one by one, no space in front"
        );
        assert_eq!(saved.tokenizer.encode_start(text).unwrap(), ids);
        assert_eq!(saved.tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(saved.tokenizer.end_token(), 2);
    }

    #[test]
    fn shards_are_read_like_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let gguf = Pretrained::open(&path).unwrap();
        let folder = dir.path().join("folder");
        gguf.save_folder(&folder, &BTreeMap::new(), DType::F32)
            .unwrap();
        fs::remove_file(folder.join("model.safetensors")).unwrap();
        let mut map = serde_json::Map::new();
        for (i, names) in gguf.weights.names().chunks(7).enumerate() {
            let file = format!("model-{i}.safetensors");
            let tensors: Vec<_> = names
                .iter()
                .map(|name| (name.clone(), gguf.weights.shape(name).unwrap()))
                .collect();
            let load = |name: &str| gguf.weights.load(name);
            hf_folder::write_safetensors(&folder.join(&file), &tensors, DType::F32, load).unwrap();
            map.extend(names.iter().map(|name| (name.clone(), file.clone().into())));
        }
        let index = json!({ "weight_map": map });
        write_json(&folder.join("model.safetensors.index.json"), &index).unwrap();
        assert_eq!(logits(&Pretrained::open(&folder).unwrap()), logits(&gguf));

        fs::write(folder.join("model-1.safetensors"), b"short").unwrap();
        let error = Pretrained::open(&folder).err().unwrap().to_string();
        assert!(
            error.contains("model-1.safetensors") && error.contains("too short"),
            "{error}"
        );
    }

    #[test]
    fn a_replaced_head_is_no_longer_tied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let gguf = Pretrained::open(&path).unwrap();
        let head = (gguf.weights.load("model.embed_tokens.weight").unwrap() * 2.).unwrap();
        let replaced = BTreeMap::from([("lm_head.weight".to_string(), head)]);
        let folder = dir.path().join("folder");
        gguf.save_folder(&folder, &replaced, DType::F32).unwrap();
        let saved = Pretrained::open(&folder).unwrap();
        assert!(!saved.config.tie_word_embeddings);
        let (tied, untied) = (logits(&gguf), logits(&saved));
        let same = tied.iter().flatten().zip(untied.iter().flatten());
        same.for_each(|(tied, untied)| assert_eq!(2. * tied, *untied));
    }

    #[test]
    fn missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Pretrained::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("config.json"), "{error}");
        let error = Pretrained::open(&dir.path().join("none.gguf"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("none.gguf: no such file"), "{error}");
        let path = dir.path().join("text.gguf");
        fs::write(&path, b"not a model").unwrap();
        let error = Pretrained::open(&path).err().unwrap().to_string();
        assert!(
            error.contains("text.gguf: not a readable GGUF file"),
            "{error}"
        );
    }
}
