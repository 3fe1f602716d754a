//! An adapter folder, read and checked as far as that goes without a model.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use candle_core::{DType, Tensor};

use super::{
    AdapterWeights, LayerWeights,
    combine::is_equal,
    entry::{Entry, is_finite},
    fingerprint::{Fingerprint, METADATA_KEY},
    folder::Folder,
    key::{self, PREFIX, Part},
    names::{Names, Parts},
    settings::Settings,
    tensors::{Tensors, read_text},
    writing::DROPOUT_POSITION,
};
use crate::{DropoutPosition, Error, Result};

/// What a folder holds, and what is wrong with it.
///
/// A model has more to say of its own; this lets its problems be told together with the files'.
#[derive(Debug)]
pub(crate) struct Reading {
    /// What could be read.
    pub weights: AdapterWeights,
    /// The paths of layers of which some tensor is missing or wrong.
    pub incomplete: BTreeSet<String>,
    /// Of weights of the base that the file has too, by `<module path>.<parameter>`.
    pub base: BTreeMap<String, Fingerprint>,
    /// One line for each thing that is wrong.
    pub problems: Vec<String>,
    /// The file that holds the tensors.
    pub file: PathBuf,
}

impl Reading {
    /// Reads a folder, or a weights file that stands in one.
    ///
    /// # Errors
    /// An [`Error::File`] or [`Error::Checkpoint`] if the files themselves are broken.
    pub fn of(path: &Path) -> Result<Self> {
        let folder = Folder::find(path)?;
        let settings = settings(&folder)?;
        let mut tensors = Tensors::open(&folder.weights)?;
        let mut reading = Self {
            weights: AdapterWeights {
                dropout: settings.dropout,
                dropout_position: settings.dropout_position,
                bias: settings.bias,
                modules_to_save: settings.modules_to_save.clone(),
                excluded: settings.excluded.clone(),
                origin: settings.origin.clone(),
                notes: settings.notes.clone(),
                ..AdapterWeights::default()
            },
            incomplete: BTreeSet::new(),
            base: BTreeMap::new(),
            problems: Vec::new(),
            file: folder.weights,
        };
        if let Some(text) = tensors.metadata.get(METADATA_KEY) {
            match text.parse() {
                Ok(fingerprint) => reading.weights.origin.fingerprint = Some(fingerprint),
                Err(problem) => reading
                    .weights
                    .notes
                    .push(format!("{METADATA_KEY}: {problem}")),
            }
        }
        match tensors.metadata.get(DROPOUT_POSITION).map(String::as_str) {
            None => {}
            Some("post") => reading.weights.dropout_position = DropoutPosition::Post,
            Some(other) => reading
                .weights
                .notes
                .push(format!("{DROPOUT_POSITION}: {other:?} is not \"post\"")),
        }
        let names = Names::of(tensors.names(), &settings);
        reading.problems.extend(names.problems);
        reading.weights.notes.extend(names.notes);
        for (path, parts) in names.layers {
            match reading.layer(&path, &parts, &mut tensors, &settings) {
                Some(layer) => {
                    reading.weights.layers.insert(path, layer);
                }
                None => {
                    reading.incomplete.insert(path);
                }
            }
        }
        for (name, keys) in names.saved {
            if let Some(tensor) = reading.saved(&keys, &mut tensors) {
                reading.weights.saved.insert(name, tensor);
            }
        }
        for (name, key) in names.base {
            if let Some(fingerprint) = reading.base_weight(&name, &key, &mut tensors) {
                reading.base.insert(name, fingerprint);
            }
        }
        if reading.weights.layers.is_empty() && reading.problems.is_empty() {
            let problem = "holds no `lora_A` and `lora_B`";
            reading.problems.push(problem.into());
        }
        reading.note_unused(&settings);
        Ok(reading)
    }

    /// The adapter, if nothing is wrong with it.
    pub fn finish(mut self) -> Result<AdapterWeights> {
        if self.problems.is_empty() {
            return Ok(self.weights);
        }
        self.problems.sort();
        Err(Error::Checkpoint {
            file: self.file,
            problems: self.problems,
        })
    }

    /// The adapter of one layer, if all its tensors are right.
    fn layer(
        &mut self,
        path: &str,
        parts: &Parts,
        tensors: &mut Tensors,
        settings: &Settings,
    ) -> Option<LayerWeights> {
        let before = self.problems.len();
        let (rank, source) = match settings.rank_of(path) {
            Ok(found) => found,
            Err(problem) => {
                self.problems.push(problem);
                return None;
            }
        };
        let (a, b) = (parts.get(&Part::A), parts.get(&Part::B));
        for (part, found) in [(Part::A, a), (Part::B, b)] {
            match found {
                None => {
                    let name = part.suffix();
                    self.problems
                        .push(format!("`{PREFIX}{path}.{name}` is missing"));
                }
                Some(name) => {
                    if let Some(entry) = tensors.entry(name) {
                        self.check_factor(name, part, entry, (rank, &source));
                    }
                }
            }
        }
        let bias = parts.get(&Part::Bias);
        match bias {
            Some(name) if !settings.lora_bias => {
                self.problems
                    .push(format!("`{name}` is there, but lora_bias is not set"));
            }
            None if settings.lora_bias => {
                let name = Part::Bias.suffix();
                self.problems.push(format!(
                    "`{PREFIX}{path}.{name}` is missing: lora_bias is set"
                ));
            }
            Some(name) => {
                let width = b.and_then(|b| tensors.entry(b)?.shape.first().copied());
                let entry = tensors.entry(name);
                if let (Some(entry), Some(width)) = (entry, width)
                    && entry.shape != [width]
                {
                    let shape = &entry.shape;
                    self.problems.push(format!(
                        "`{name}` has shape {shape:?}; it must be [{width}]"
                    ));
                }
                if let Some(entry) = entry {
                    self.check_type(name, entry);
                }
            }
            None => {}
        }
        let alpha = settings.alpha_of(path);
        let alpha = alpha.map_err(|problem| self.problems.push(problem)).ok()?;
        if self.problems.len() > before {
            return None;
        }
        let (a, b) = (self.tensor(a?, tensors), self.tensor(b?, tensors));
        let bias = bias.map(|name| self.tensor(name, tensors));
        Some(LayerWeights {
            a: a?,
            b: b?,
            bias: match bias {
                Some(tensor) => Some(tensor?),
                None => None,
            },
            alpha,
            rslora: settings.rslora,
        })
    }

    /// Checks what `A`, `[rank, in]`, or `B`, `[out, rank]`, can be without a model.
    fn check_factor(&mut self, name: &str, part: Part, entry: &Entry, rank: (usize, &str)) {
        let (rank, source) = rank;
        let shape = &entry.shape;
        let (form, found) = match (part, shape.as_slice()) {
            (Part::A, &[rank, _]) => ("[rank, in]", rank),
            (_, &[_, rank]) => ("[out, rank]", rank),
            (_, shape) if shape.len() > 2 => {
                self.problems.push(format!(
                    "`{name}` has shape {shape:?}: it adapts a convolution; only linear layers \
                     are supported"
                ));
                return;
            }
            (part, _) => {
                let form = if part == Part::A {
                    "[rank, in]"
                } else {
                    "[out, rank]"
                };
                self.problems
                    .push(format!("`{name}` has shape {shape:?}; it must be {form}"));
                return;
            }
        };
        if shape.contains(&0) {
            self.problems
                .push(format!("`{name}` is empty: it has shape {shape:?}"));
        } else if found != rank {
            self.problems.push(format!(
                "`{name}` has shape {shape:?}, {form}; with rank {rank} (by {source} in the \
                 configuration) it can't"
            ));
        }
        self.check_type(name, entry);
    }

    fn check_type(&mut self, name: &str, entry: &Entry) {
        let known = [DType::F32, DType::F64, DType::BF16, DType::F16];
        if !known.contains(&entry.dtype) {
            let dtype = entry.dtype.as_str();
            self.problems.push(format!(
                "`{name}` has type {dtype}; adapters are f32, f64, bf16 or f16"
            ));
        }
    }

    /// Reads a tensor; says so if it can't be, or isn't finite.
    fn tensor(&mut self, name: &str, tensors: &mut Tensors) -> Option<Tensor> {
        let read = tensors.read(name).and_then(|tensor| {
            match is_finite(&tensor).map_err(|error| error.to_string())? {
                true => Ok(tensor),
                false => Err("holds NaN or infinity".into()),
            }
        });
        read.map_err(|problem| self.problems.push(format!("`{name}` {problem}")))
            .ok()
    }

    /// Reads a whole tensor, which may stand in the file more than once.
    fn saved(&mut self, keys: &[String], tensors: &mut Tensors) -> Option<Tensor> {
        let (first, copies) = keys.split_first()?;
        let tensor = self.tensor(first, tensors)?;
        for copy in copies {
            match is_equal(&self.tensor(copy, tensors)?, &tensor) {
                Ok(true) => self
                    .weights
                    .notes
                    .push(format!("`{copy}` is a copy of `{first}`")),
                Ok(false) => self.problems.push(format!(
                    "`{first}` and `{copy}` are the same tensor, but differ"
                )),
                Err(error) => self.problems.push(format!("`{copy}`: {error}")),
            }
        }
        Some(tensor)
    }

    /// The fingerprint of a weight of the base, if it can be told.
    fn base_weight(&mut self, name: &str, key: &str, tensors: &mut Tensors) -> Option<Fingerprint> {
        let tensor = self.tensor(key, tensors)?;
        // What f16 made of a base can't be told from another base.
        if tensor.dtype() == DType::F16 {
            return None;
        }
        Fingerprint::of([(name, &tensor)])
            .map_err(|error| self.problems.push(error.to_string()))
            .ok()
    }

    /// Notes what the configuration names and the tensors lack.
    fn note_unused(&mut self, settings: &Settings) {
        let layers = &self.weights.layers;
        let known = || layers.keys().chain(&self.incomplete);
        let mut notes = Vec::new();
        let ends: HashSet<&str> = known().flat_map(|path| key::ends(path)).collect();
        for target in settings.targets.iter().flatten() {
            if !ends.contains(target.as_str()) {
                notes.push(format!("target_modules: `{target}` has no tensors"));
            }
        }
        if let Some(targets) = &settings.targets {
            let targets: HashSet<&str> = targets.iter().map(String::as_str).collect();
            for path in known().filter(|path| !key::ends(path).any(|end| targets.contains(end))) {
                notes.push(format!(
                    "target_modules doesn't name `{path}`, which has tensors"
                ));
            }
        }
        for entry in &settings.modules_to_save {
            let saved = &self.weights.saved;
            if !saved.keys().any(|name| key::is_saved_by(name, entry)) {
                notes.push(format!("modules_to_save: `{entry}` has no tensors"));
            }
        }
        for (field, unused) in [
            ("rank_pattern", settings.rank_pattern.unused(known())),
            ("alpha_pattern", settings.alpha_pattern.unused(known())),
        ] {
            for pattern in unused {
                notes.push(format!("{field}: `{pattern}` matches no layer"));
            }
        }
        self.weights.notes.extend(notes);
    }
}

/// Reads the configuration files.
fn settings(folder: &Folder) -> Result<Settings> {
    let problems = |file: &Path, mut problems: Vec<String>| {
        problems.sort();
        Error::file(file, problems.join("; "))
    };
    let mut settings = Settings::parse(&read_text(&folder.config)?)
        .map_err(|found| problems(&folder.config, found))?;
    if let Some(file) = &folder.automodel {
        settings
            .add_automodel(&read_text(file)?)
            .map_err(|found| problems(file, found))?;
    }
    Ok(settings)
}
