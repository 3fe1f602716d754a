//! Text to tokens and back, and chat messages to text.

use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use minijinja::context;
use minijinja::syntax::SyntaxConfig;
use serde::Deserialize;
use serde::Serialize;
use serde_json::Map;
use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

use crate::Error;
use crate::Result;
use crate::config::Config;
use crate::files;
use crate::gguf;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

/// A tokenizer with what its `tokenizer_config.json` says.
pub struct TextTokenizer {
    inner: Tokenizer,
    config: Map<String, Value>,
    end_token: u32,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model folder.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or damaged, or no end token is named anywhere.
    pub fn from_folder(dir: &Path, model: &Config) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::model(
                &path,
                "no such file; save the tokenizer as tokenizer.json",
            ));
        }
        let inner = Tokenizer::from_file(&path).map_err(|e| Error::model(&path, e.to_string()))?;
        let mut config = files::read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let template = dir.join("chat_template.jinja");
        if template.exists() {
            let text = std::fs::read_to_string(&template).map_err(Error::io(&template))?;
            config.insert("chat_template".into(), text.into());
        }
        Self::new(inner, config, model)
    }

    /// Builds the tokenizer that GGUF metadata describes.
    ///
    /// # Errors
    /// If its pre-tokenizer is not one whose token ids are known to be right: `smollm`, `qwen2`.
    pub fn from_gguf(content: &Content, model: &Config) -> Result<Self> {
        let pre = gguf::text(content, "tokenizer.ggml.pre")?;
        let mut inner = Tokenizer::from_gguf(content)?;
        match pre.as_str() {
            "qwen2" => {}
            // candle has GPT-2's prefix space and digit groups for every other name.
            "smollm" => {
                let steps = vec![
                    Digits::new(true).into(),
                    ByteLevel::default().add_prefix_space(false).into(),
                ];
                inner.with_pre_tokenizer(Some(Sequence::new(steps)));
            }
            _ => {
                return Err(Error::tokenizer(format!(
                    "GGUF pre-tokenizer `{pre}` is not supported (smollm and qwen2 are); \
                     use the model's Hugging Face folder"
                )));
            }
        }
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("model_max_length".into(), model.max_length.into());
        for (key, field) in [
            ("bos", "bos_token"),
            ("eos", "eos_token"),
            ("padding", "pad_token"),
        ] {
            let id = gguf::number(content, &format!("tokenizer.ggml.{key}_token_id")).ok();
            if let Some(token) = id.and_then(|id| inner.id_to_token(u32::try_from(id).ok()?)) {
                config.insert(field.into(), token.into());
            }
        }
        if let Ok(template) = gguf::text(content, "tokenizer.chat_template") {
            config.insert("chat_template".into(), template.into());
        }
        Self::new(inner, config, model)
    }

    fn new(inner: Tokenizer, config: Map<String, Value>, model: &Config) -> Result<Self> {
        let named = special(&config, "eos_token").and_then(|token| inner.token_to_id(token));
        let end_token = named
            .or(model.eos_token_ids.first().copied())
            .ok_or_else(|| {
                Error::tokenizer("neither tokenizer_config.json nor config.json names an end token")
            })?;
        Ok(Self {
            inner,
            config,
            end_token,
        })
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let json = self.inner.to_string(true).map_err(Error::tokenizer)?;
        files::write_bytes(&dir.join("tokenizer.json"), json.as_bytes())?;
        let path = dir.join("tokenizer_config.json");
        let json = serde_json::to_vec_pretty(&self.config).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        files::write_bytes(&path, &json)
    }

    /// The token that ends a completion.
    pub fn end_token(&self) -> u32 {
        self.end_token
    }

    /// Tokens of a text that opens a sequence: with the model's start token, if it has one.
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// Tokens of a text that continues one, or of a rendered chat.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, start)
            .map_err(Error::tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(Error::tokenizer)
    }

    /// Renders a conversation with the model's chat template.
    ///
    /// With `reply`, the text ends where the assistant's answer starts.
    ///
    /// # Errors
    /// If the model has no chat template, or the template refuses the messages.
    pub fn render_chat(&self, messages: &[Message], reply: bool) -> Result<String> {
        let template = self
            .config
            .get("chat_template")
            .and_then(Value::as_str)
            .ok_or_else(|| {
                Error::tokenizer(
                    "the model has no chat template; give rows with `prompt` and `completion`",
                )
            })?;
        let mut jinja = minijinja::Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        jinja.set_syntax(syntax.map_err(Error::tokenizer)?);
        jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        jinja.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, _> {
                Err(minijinja::Error::new(
                    minijinja::ErrorKind::InvalidOperation,
                    message,
                ))
            },
        );
        let fill = context! {
            messages => minijinja::value::Serde(messages),
            add_generation_prompt => reply,
            bos_token => special(&self.config, "bos_token").unwrap_or(""),
            eos_token => special(&self.config, "eos_token").unwrap_or(""),
        };
        jinja
            .render_str(template, fill)
            .map_err(|e| Error::tokenizer(format!("chat template: {e}")))
    }
}

/// A special token, which is written as a string or as an object with `content`.
fn special<'a>(config: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    let token = config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}
