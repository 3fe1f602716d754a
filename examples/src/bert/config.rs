//! Configuration of a BERT model: Hugging Face's `config.json`.

use std::path::Path;

use serde::Deserialize;

use crate::Error;
use crate::Result;
use crate::files;

/// Shapes and constants of a BERT model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Config {
    /// Class names of the model that the folder holds.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Number of segments.
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    /// Added to the variance in LayerNorm.
    #[serde(default = "tiny")]
    pub layer_norm_eps: f64,
    /// Activation of the MLP.
    hidden_act: String,
    /// `absolute` is the only kind known here.
    #[serde(default)]
    position_embedding_type: Option<String>,
    /// Classes by number; their count is the classifier's width.
    #[serde(default)]
    id2label: serde_json::Map<String, serde_json::Value>,
}

fn two() -> usize {
    2
}

fn tiny() -> f64 {
    1e-12
}

impl Config {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// If the file is missing or damaged, lacks a field, or asks for something unsupported.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let json = files::read_json(&path)?.ok_or_else(|| Error::model(&path, "no such file"))?;
        let config: Self =
            serde_json::from_value(json.into()).map_err(|source| Error::Json { path, source })?;
        config.check()
    }

    /// Number of classes; 2 where the file names none, as in transformers.
    pub fn num_labels(&self) -> usize {
        match self.id2label.len() {
            0 => 2,
            labels => labels,
        }
    }

    fn check(self) -> Result<Self> {
        if self.hidden_act != "gelu" {
            let problem = format!("is {}; only \"gelu\" is supported", self.hidden_act);
            return Err(Error::config("hidden_act", problem));
        }
        if let Some(kind) = &self.position_embedding_type
            && kind != "absolute"
        {
            let problem = format!("is {kind}; only \"absolute\" is supported");
            return Err(Error::config("position_embedding_type", problem));
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if heads == 0 || !hidden.is_multiple_of(heads) {
            let problem = format!("is {heads}, which does not divide hidden_size {hidden}");
            return Err(Error::config("num_attention_heads", problem));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use serde_json::json;

    use super::*;

    fn parse(changes: Value) -> Result<Config> {
        let mut json = json!({
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 3, "vocab_size": 40, "max_position_embeddings": 64,
            "hidden_act": "gelu",
        });
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
        Config::read(dir.path())
    }

    #[test]
    fn absent_fields_take_the_defaults_of_transformers() {
        let config = parse(json!({})).unwrap();
        assert_eq!((config.type_vocab_size, config.layer_norm_eps), (2, 1e-12));
        assert_eq!(config.num_labels(), 2);
        let three = json!({"id2label": {"0": "a", "1": "b", "2": "c"}});
        assert_eq!(parse(three).unwrap().num_labels(), 3);
    }

    #[test]
    fn errors_name_the_field() {
        for (changes, message) in [
            (json!({"hidden_act": "relu"}), "`hidden_act` is relu"),
            (
                json!({"num_attention_heads": 5}),
                "`num_attention_heads` is 5",
            ),
            (
                json!({"position_embedding_type": "relative_key"}),
                "`position_embedding_type` is relative_key",
            ),
        ] {
            let error = parse(changes).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
