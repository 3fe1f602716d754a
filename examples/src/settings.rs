//! What decides a training run, as options and as saved with it.

use std::path::Path;
use std::path::PathBuf;

use lora_core::targets;
use serde::Deserialize;
use serde::Serialize;
use serde_json::Map;
use serde_json::Value;

use crate::Error;
use crate::Result;
use crate::model::CausalLm;

/// The options of a run; what is not given keeps its default, or the value a resumed run had.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Options {
    /// Model: a .gguf file or a Hugging Face folder [default: SmolLM2-135M-Instruct, fetched]
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Rows to train on, JSON lines with "prompt" and "completion" or "messages" [default: WordNet categories]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Held-out rows [default: a tenth of --data, at most 200]
    #[arg(long, value_name = "FILE", requires = "data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<PathBuf>,
    /// Layers to adapt, names or patterns [default: all seven projections]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    /// Rank of the adapters [default: 8]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Numerator of the scaling alpha / rank [default: 16]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Dropout on the adapters' branch [default: 0]
    #[arg(long, value_name = "PROBABILITY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Highest learning rate: 5 steps of rise, then a linear fall [default: 0.002]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Optimizer steps [default: 60]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Rows a step [default: 8]
    #[arg(long, value_name = "ROWS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Longest row in tokens; longer ones are cut [default: 512]
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<usize>,
    /// Seed of adapters, dropout and the order of rows [default: 42]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Where to compute: cpu, cuda or cuda:N [default: cpu]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Type of the base weights: f32 or bf16 [default: f32 on the CPU, bf16 on a card]
    #[arg(long, value_name = "TYPE", value_parser = ["f32", "bf16"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
}

/// Everything that a loss depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Model file or folder; `None` is the default model.
    pub model: Option<PathBuf>,
    /// Rows to train on; `None` is the WordNet task.
    pub data: Option<PathBuf>,
    /// Held-out rows.
    pub test: Option<PathBuf>,
    /// Names or patterns of the layers to adapt.
    pub targets: Vec<String>,
    /// Rank of the adapters.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Dropout probability.
    pub dropout: f64,
    /// Highest learning rate.
    pub lr: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// Rows a step.
    pub batch: usize,
    /// Longest row, in tokens.
    pub seq_len: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// `f32` or `bf16`; `None` is what suits the device.
    #[serde(default)]
    pub dtype: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        let targets = targets!(CausalLm: [
            "*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj", "*.down_proj"
        ]);
        Self {
            model: None,
            data: None,
            test: None,
            targets: targets.map(String::from).to_vec(),
            rank: 8,
            alpha: 16.,
            dropout: 0.,
            lr: 2e-3,
            steps: 60,
            batch: 8,
            seq_len: 512,
            seed: 42,
            device: "cpu".into(),
            dtype: None,
        }
    }
}

impl Settings {
    /// The defaults with the options that are given.
    ///
    /// # Errors
    /// [`Error::Usage`] naming an option that makes no sense.
    pub fn new(options: &Options) -> Result<Self> {
        let mut fields = fields(&Self::default())?;
        fields.extend(given(options)?);
        let settings: Self = from_fields(fields)?;
        for (option, value) in [
            ("--steps", settings.steps),
            ("--batch", settings.batch),
            ("--seq-len", settings.seq_len),
        ] {
            if value == 0 {
                return Err(Error::Usage(format!("{option} must be at least 1")));
            }
        }
        if !(settings.lr > 0. && settings.lr.is_finite()) {
            return Err(Error::Usage(format!(
                "--lr {} is not a positive number",
                settings.lr
            )));
        }
        Ok(settings)
    }

    /// The settings of a saved run, if no given option contradicts them.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the first option that differs.
    pub fn resumed(self, options: &Options) -> Result<Self> {
        let saved = fields(&self)?;
        for (name, value) in given(options)? {
            if saved.get(&name) != Some(&value) {
                let was = saved.get(&name).unwrap_or(&Value::Null);
                return Err(Error::Usage(format!(
                    "--{} {value} cannot be changed in a run that was started with {was}; \
                     leave it out, or start anew with another --out",
                    name.replace('_', "-")
                )));
            }
        }
        Ok(self)
    }
}

/// The options that are given, with absolute paths: a run may be resumed from another folder.
fn given(options: &Options) -> Result<Map<String, Value>> {
    let mut options = options.clone();
    for path in [&mut options.model, &mut options.data, &mut options.test]
        .into_iter()
        .flatten()
    {
        *path = std::path::absolute(&*path).map_err(Error::io(path))?;
    }
    fields(&options)
}

fn fields(value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value).map_err(json_error)? {
        Value::Object(fields) => Ok(fields),
        other => Err(Error::Usage(format!("settings are {other}, not an object"))),
    }
}

fn from_fields(fields: Map<String, Value>) -> Result<Settings> {
    serde_json::from_value(Value::Object(fields)).map_err(json_error)
}

fn json_error(source: serde_json::Error) -> Error {
    Error::Json {
        path: Path::new("settings").into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_override_defaults_but_not_a_saved_run() {
        let options = Options {
            rank: Some(4),
            data: Some("rows.jsonl".into()),
            ..Options::default()
        };
        let settings = Settings::new(&options).unwrap();
        assert_eq!(
            (settings.rank, settings.alpha, settings.targets.len()),
            (4, 16., 7)
        );
        assert!(settings.data.as_ref().unwrap().is_absolute());
        assert_eq!(settings.clone().resumed(&options).unwrap(), settings);
        assert_eq!(
            settings.clone().resumed(&Options::default()).unwrap(),
            settings
        );
        let other = Options {
            rank: Some(16),
            ..Options::default()
        };
        let error = settings.resumed(&other).unwrap_err().to_string();
        assert!(
            error.contains("--rank 16") && error.contains("started with 4"),
            "{error}"
        );
    }

    #[test]
    fn impossible_options_are_named() {
        for (options, name) in [
            (
                Options {
                    steps: Some(0),
                    ..Options::default()
                },
                "--steps",
            ),
            (
                Options {
                    seq_len: Some(0),
                    ..Options::default()
                },
                "--seq-len",
            ),
            (
                Options {
                    lr: Some(-1.),
                    ..Options::default()
                },
                "--lr",
            ),
        ] {
            let error = Settings::new(&options).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
