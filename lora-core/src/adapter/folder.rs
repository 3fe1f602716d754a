//! The files of an adapter folder.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
/// NeMo AutoModel's second configuration.
pub(super) const AUTOMODEL: &str = "automodel_peft_config.json";

/// The files that may hold the tensors, the one that is preferred first.
const HOLDERS: [&str; 5] = [
    WEIGHTS,
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
    // So transformers' own save_pretrained calls it, for an adapter as for a model.
    "model.safetensors.index.json",
];

/// Where an adapter's configuration and tensors are.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    pub config: PathBuf,
    pub automodel: Option<PathBuf>,
    pub weights: PathBuf,
}

impl Folder {
    /// Finds the files of a folder, or those that stand beside a weights file.
    pub fn find(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(|error| Error::file(path, error))?;
        let is_config = path.file_name().is_some_and(|name| name == CONFIG);
        let dir = if metadata.is_dir() {
            path
        } else {
            path.parent().unwrap_or(path)
        };
        let weights = if metadata.is_dir() || is_config {
            match HOLDERS
                .map(|name| dir.join(name))
                .into_iter()
                .find(|file| file.exists())
            {
                Some(file) => file,
                None => return Err(without_weights(dir)),
            }
        } else {
            path.to_path_buf()
        };
        Ok(Self {
            config: dir.join(CONFIG),
            automodel: Some(dir.join(AUTOMODEL)).filter(|file| file.exists()),
            weights,
        })
    }
}

/// The adapters in a folder by name: PEFT keeps one that isn't called `default` in a
/// sub-directory of its name.
pub(super) fn named(dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let place = |error| Error::file(dir, error);
    let mut adapters = BTreeMap::new();
    if dir.join(CONFIG).exists() {
        adapters.insert("default".to_string(), dir.to_path_buf());
    }
    for entry in fs::read_dir(dir).map_err(place)? {
        let path = entry.map_err(place)?.path();
        if !path.join(CONFIG).is_file() {
            continue;
        }
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::file(&path, "has a name that is no text"))?;
        if adapters.insert(name.to_string(), path.clone()).is_some() {
            let reason = "is called like the adapter of the folder itself, `default`";
            return Err(Error::file(path, reason));
        }
    }
    Ok(adapters)
}

/// Says what a folder without tensors has instead.
fn without_weights(dir: &Path) -> Error {
    let mut inside: Vec<String> = named(dir).unwrap_or_default().into_keys().collect();
    inside.retain(|name| name != "default");
    Error::file(
        dir,
        if inside.is_empty() {
            format!("holds no adapter: none of {} is there", HOLDERS.join(", "))
        } else {
            format!(
                "holds adapters by name: {}; read one of these folders, or all with read_named",
                inside.join(", ")
            )
        },
    )
}
