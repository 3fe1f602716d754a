//! Training steps, and the one file from which a run goes on as if it had not stopped.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use candle_core::Device;
use candle_core::Tensor;
use lora_core::LoraReport;
use lora_core::LoraTargets;
use lora_core::PeftConfig;
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::Serialize;

use crate::Error;
use crate::Result;
use crate::batch::Batch;
use crate::batch::Example;
use crate::batch::rows_of_step;
use crate::evaluate;
use crate::files;
use crate::model::CausalLm;
use crate::optimizer::AdamW;
use crate::optimizer::AdamWConfig;
use crate::optimizer::linear_schedule;
use crate::settings::Settings;

/// Steps over which the learning rate rises.
const WARMUP: usize = 5;
const STATE: &str = "trainer_state.safetensors";

/// A model in training.
pub struct Trainer {
    /// The model with its adapters.
    pub model: CausalLm,
    run: Run,
    optimizer: AdamW,
    losses: Vec<f32>,
    checked: bool,
}

/// What a saved state says about its run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Run {
    settings: Settings,
    /// SHA-256 of the rows.
    data: String,
    /// Steps done.
    step: usize,
    /// Those of them that changed the parameters.
    optimizer_steps: u64,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Step {
    /// Number of the step, from 1.
    pub step: usize,
    /// Mean cross-entropy of the learned tokens, in nats, before the step.
    pub loss: f32,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of the rows.
    pub tokens: usize,
}

impl Trainer {
    /// Attaches adapters to a model; `data` identifies the rows.
    ///
    /// # Errors
    /// If the settings make no valid adapter, or a target names no layer.
    pub fn new(
        mut model: CausalLm,
        settings: Settings,
        data: String,
    ) -> Result<(Self, LoraReport)> {
        let config = PeftConfig::new(settings.targets.iter().map(String::as_str))
            .dim(settings.rank)
            .alpha(settings.alpha)
            .dropout(settings.dropout)
            .seed(settings.seed);
        let report = model.apply_lora(&config)?;
        let optimizer = AdamW::new(model.named_lora_vars()?, AdamWConfig::default())?;
        let run = Run {
            settings,
            data,
            step: 0,
            optimizer_steps: 0,
        };
        let trainer = Self {
            model,
            run,
            optimizer,
            losses: Vec::new(),
            checked: false,
        };
        Ok((trainer, report))
    }

    /// Takes the step that is due.
    ///
    /// # Errors
    /// If an adapter gets no gradient, or a row is longer than the model's context.
    pub fn step(&mut self, rows: &[Example]) -> Result<Step> {
        let Settings {
            batch,
            seed,
            lr,
            steps,
            ..
        } = self.run.settings;
        let step = self.run.step;
        let drawn = rows_of_step(step, batch, rows.len(), seed);
        let batch = Batch::to_learn(drawn.iter().map(|i| &rows[*i]), self.model.device())?;
        self.model.set_dropout_step(step as u64)?;
        let loss = evaluate::loss(&self.model, &batch)?;
        let grads = loss.backward()?;
        if !self.checked {
            self.model.check_gradients(&grads)?;
            self.checked = true;
        }
        let lr = linear_schedule(lr, step, WARMUP, steps);
        let grad_norm = self.optimizer.step(&grads, lr)?;
        let loss = loss.to_scalar::<f32>()?;
        self.losses.push(loss);
        self.run.step += 1;
        self.run.optimizer_steps = self.optimizer.steps();
        let tokens = drawn.iter().map(|i| rows[*i].ids.len()).sum();
        Ok(Step {
            step: self.run.step,
            loss,
            lr,
            grad_norm,
            tokens,
        })
    }

    /// Number of steps done.
    pub fn steps_done(&self) -> usize {
        self.run.step
    }

    /// Loss of each step done.
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    /// Writes the state, then the adapter folder.
    ///
    /// Whenever the process is killed, the state in `dir` is one that was complete.
    ///
    /// # Errors
    /// If a file cannot be written; the old ones are still there then.
    pub fn save(&mut self, dir: &Path) -> Result<()> {
        files::create_dir(dir)?;
        let path = dir.join(STATE);
        let mut tensors = self.optimizer.state();
        if !self.losses.is_empty() {
            tensors.insert(
                "losses".into(),
                Tensor::new(self.losses.as_slice(), &Device::Cpu)?,
            );
        }
        let run = serde_json::to_string(&self.run).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        let run = HashMap::from([("run".to_string(), run)]);
        let bytes = safetensors::serialize(&tensors, Some(run))
            .map_err(|e| Error::model(&path, e.to_string()))?;
        files::write_bytes(&path, &bytes)?;
        Ok(self.model.save_adapter(dir)?)
    }

    /// Continues where `saved` stopped.
    ///
    /// # Errors
    /// If the rows are others than those the run was started with, or the state does not fit.
    pub fn resume(&mut self, saved: &SavedRun) -> Result<()> {
        if saved.run.data != self.run.data {
            return Err(Error::Usage(
                "the data are not the ones the run was started with; start anew with another --out"
                    .into(),
            ));
        }
        self.optimizer
            .restore(&saved.tensors, saved.run.optimizer_steps)?;
        self.losses = match saved.tensors.get("losses") {
            Some(losses) => losses.to_vec1()?,
            None => Vec::new(),
        };
        self.run = saved.run.clone();
        Ok(())
    }
}

/// A state on the disk.
pub struct SavedRun {
    run: Run,
    tensors: BTreeMap<String, Tensor>,
}

impl SavedRun {
    /// Reads the state in `dir`; `None` where there is none yet.
    ///
    /// # Errors
    /// If the file is not a state of this program.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(STATE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let damaged =
            |problem: String| Error::model(&path, format!("not a trainer state: {problem}"));
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let run = metadata
            .metadata()
            .as_ref()
            .and_then(|notes| notes.get("run"));
        let run = run.ok_or_else(|| damaged("it says nothing about a run".into()))?;
        let run = serde_json::from_str(run).map_err(|e| damaged(e.to_string()))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        Ok(Some(Self {
            run,
            tensors: tensors.into_iter().collect(),
        }))
    }

    /// The settings of the run.
    pub fn settings(&self) -> &Settings {
        &self.run.settings
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::data::Row;
    use crate::pretrained::Pretrained;
    use crate::tiny;

    fn rows(pretrained: &Pretrained) -> Vec<Example> {
        let rows = ["a", "b", "c", "ab", "1", "2"].map(|text| Row::Completion {
            prompt: format!("{text}1"),
            completion: format!(" c{text}"),
        });
        crate::batch::examples(&rows, &pretrained.tokenizer, 64)
            .unwrap()
            .0
    }

    fn trainer(pretrained: &Pretrained, data: &str) -> Trainer {
        let settings = Settings {
            steps: 6,
            batch: 4,
            dropout: 0.3,
            ..Settings::default()
        };
        let model = pretrained.load(DType::F32, &Device::Cpu).unwrap();
        Trainer::new(model, settings, data.into()).unwrap().0
    }

    #[test]
    fn a_resumed_run_is_the_uninterrupted_run_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let pretrained = Pretrained::open(&path).unwrap();
        let rows = rows(&pretrained);
        let [whole_dir, parts_dir] = ["whole", "parts"].map(|name| dir.path().join(name));

        let mut whole = trainer(&pretrained, "rows");
        while whole.steps_done() < 6 {
            whole.step(&rows).unwrap();
        }
        whole.save(&whole_dir).unwrap();
        assert!(
            whole.losses()[5] < whole.losses()[0],
            "{:?}",
            whole.losses()
        );

        assert!(SavedRun::open(&parts_dir).unwrap().is_none());
        let mut first = trainer(&pretrained, "rows");
        first.save(&parts_dir).unwrap();
        for stop in [2, 3, 6] {
            let saved = SavedRun::open(&parts_dir).unwrap().unwrap();
            assert_eq!(saved.settings().steps, 6);
            let mut next = trainer(&pretrained, "rows");
            next.resume(&saved).unwrap();
            while next.steps_done() < stop {
                next.step(&rows).unwrap();
            }
            next.save(&parts_dir).unwrap();
        }
        for file in [STATE, "adapter_model.safetensors", "adapter_config.json"] {
            let [whole, parts] =
                [&whole_dir, &parts_dir].map(|dir| fs::read(dir.join(file)).unwrap());
            assert!(whole == parts, "{file}");
        }
    }

    #[test]
    fn other_rows_and_damaged_states_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        tiny::write_gguf(&path);
        let pretrained = Pretrained::open(&path).unwrap();
        trainer(&pretrained, "rows").save(dir.path()).unwrap();
        let saved = SavedRun::open(dir.path()).unwrap().unwrap();
        let error = trainer(&pretrained, "others")
            .resume(&saved)
            .unwrap_err()
            .to_string();
        assert!(error.contains("not the ones"), "{error}");
        fs::write(dir.path().join(STATE), b"{").unwrap();
        let error = SavedRun::open(dir.path()).err().unwrap().to_string();
        assert!(
            error.contains("trainer_state.safetensors: not a trainer state"),
            "{error}"
        );
    }
}
