//! An adapter folder, written.

use std::{collections::BTreeMap, fs, io::Write, path::Path};

use candle_core::{Device, Tensor};

use super::{
    AdapterWeights, Profile,
    config_file::ConfigFile,
    consumers::Consumer,
    entry::is_finite,
    fingerprint::METADATA_KEY,
    folder::{AUTOMODEL, CONFIG, WEIGHTS},
    header,
    key::{self, Key, PREFIX, Part},
};
use crate::{BiasMode, DropoutPosition, Error, Result, atomic::Staged};

/// Where a safetensors file's metadata tell that dropout is on the adapter's output.
pub(super) const DROPOUT_POSITION: &str = "lora_core.dropout_position";

/// The body of [`AdapterWeights::write`].
pub(super) fn write(adapter: &AdapterWeights, dir: &Path, profile: Profile) -> Result<()> {
    let universal = match profile {
        Profile::Peft => None,
        Profile::Universal => Some(adapter.to_universal()?),
    };
    let meant = &adapter.layers;
    let adapter = universal.as_ref().unwrap_or(adapter);
    let tensors = tensors(adapter, dir)?;
    let config = ConfigFile::of(adapter, profile)
        .text()
        .map_err(|error| Error::file(dir.join(CONFIG), error))?;
    let mut metadata = BTreeMap::from([("format", "pt".to_string())]);
    if let Some(fingerprint) = &adapter.origin.fingerprint {
        metadata.insert(METADATA_KEY, fingerprint.to_string());
    }
    if adapter.dropout_position == DropoutPosition::Post && adapter.dropout > 0.0 {
        // PEFT's configuration has no word for it.
        metadata.insert(DROPOUT_POSITION, "post".to_string());
    }

    fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
    let (config_path, weights_path) = (dir.join(CONFIG), dir.join(WEIGHTS));
    let staged_weights = Staged::write(&weights_path, |file| {
        header::write(file, &metadata, &tensors)
    })?;
    let staged_config = Staged::write(&config_path, |file| file.write_all(config.as_bytes()))?;
    // What was written must act as what was meant, by the rules of those who will read it.
    let consumers: &[Consumer] = match profile {
        Profile::Peft => &[Consumer::Peft],
        Profile::Universal => &Consumer::ALL,
    };
    for consumer in consumers {
        consumer
            .check(staged_config.beside(), staged_weights.beside(), meant)
            .map_err(|problems| Error::Checkpoint {
                file: dir.to_path_buf(),
                problems,
            })?;
    }

    let same = fs::read(&config_path).is_ok_and(|old| old == config.as_bytes());
    let foreign = [(config_path, !same), (dir.join(AUTOMODEL), true)];
    for (path, foreign) in foreign {
        if foreign && path.exists() {
            // Weights must never stand beside the configuration of others, which could load.
            fs::remove_file(&path).map_err(|error| Error::file(&path, error))?;
        }
    }
    staged_weights.commit()?;
    staged_config.commit()
}

/// The tensors by their names in the file.
fn tensors(adapter: &AdapterWeights, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut problems = Vec::new();
    let mut tensors = BTreeMap::new();
    if adapter.layers.is_empty() {
        problems.push("the adapter has no layer".to_string());
    }
    let with_bias = adapter.layers.values().any(|layer| layer.bias.is_some());
    for (path, layer) in &adapter.layers {
        let at = |error: candle_core::Error| Error::module(path, error.to_string());
        problems.extend(layer.problem().map(|problem| format!("`{path}` {problem}")));
        let mut parts = vec![(Part::A, layer.a.clone()), (Part::B, layer.b.clone())];
        if with_bias {
            // The setting is the whole file's; a layer without it gets zeros.
            let bias = match &layer.bias {
                Some(bias) => bias.clone(),
                None => Tensor::zeros(layer.out_features(), layer.b.dtype(), &Device::Cpu)
                    .map_err(at)?,
            };
            parts.push((Part::Bias, bias));
        }
        for (part, tensor) in parts {
            let name = format!("{PREFIX}{path}.{}", part.suffix());
            let meant = Key::Lora {
                path: path.clone(),
                part,
                adapter: None,
            };
            if key::parse(&name).as_ref() != Ok(&meant) {
                problems.push(format!("`{path}` can't be told from PEFT's own names"));
            }
            tensors.insert(name, tensor);
        }
    }
    for (name, tensor) in &adapter.saved {
        let module = name.strip_suffix(".bias");
        let by_module = |entry: &String| key::is_saved_by(name, entry);
        if !(adapter.bias != BiasMode::None && module.is_some()
            || adapter.modules_to_save.iter().any(by_module))
        {
            problems.push(format!(
                "`{name}`: neither modules_to_save nor bias calls for it"
            ));
        }
        let written = match module.filter(|module| adapter.layers.contains_key(*module)) {
            Some(module) => format!("{PREFIX}{module}.base_layer.bias"),
            None => format!("{PREFIX}{name}"),
        };
        if key::parse(&written) != Ok(Key::Saved(name.clone())) {
            problems.push(format!("`{name}` can't be told from PEFT's own names"));
        }
        tensors.insert(written, tensor.clone());
    }
    for (name, tensor) in &mut tensors {
        let at = |error: candle_core::Error| Error::module(name, error.to_string());
        *tensor = tensor
            .to_device(&Device::Cpu)
            .and_then(|tensor| tensor.contiguous())
            .map_err(at)?;
        if !is_finite(tensor).map_err(at)? {
            problems.push(format!("`{name}` holds NaN or infinity"));
        }
    }
    if problems.is_empty() {
        return Ok(tensors);
    }
    problems.dedup();
    Err(Error::Checkpoint {
        file: dir.to_path_buf(),
        problems,
    })
}
