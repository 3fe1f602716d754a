//! A base model's folder, copied with adapters merged into its weights.

use std::fs;
use std::path::Path;

use lora_core::MergedAdapters;

use crate::Error;
use crate::Result;
use crate::files;
use crate::hf_folder::HfFolder;

const INDEX: &str = "model.safetensors.index.json";

/// What became of the files of the base folder.
#[derive(Debug, Default)]
pub struct MergedFolder {
    /// The weight files, and how many of their tensors the adapters changed.
    pub weights: Vec<(String, usize)>,
    /// The files that were copied as they are.
    pub copied: Vec<String>,
    /// The files that were not: other forms of the weights, which have no adapter in them, and
    /// whatever else is neither configuration nor tokenizer.
    pub left_out: Vec<String>,
}

/// Writes the folder `out`: the safetensors files of `base` with `merged` in them, one tensor in
/// memory at a time and every other byte as it was, and its configuration and tokenizer.
///
/// # Errors
/// If something of the adapters finds no place, `out` holds anything already, or a file cannot be
/// read or written. There is then no folder `out`.
pub fn merge_folder(base: &Path, merged: &MergedAdapters, out: &Path) -> Result<MergedFolder> {
    check_empty(out)?;
    check_config(base, merged)?;
    let Some(name) = out.file_name() else {
        return Err(Error::Usage(format!(
            "{} is no folder to write",
            out.display()
        )));
    };
    // One name, so that the next run overwrites what a killed one left.
    let mut beside = name.to_os_string();
    beside.push(".lora-merge");
    let beside = out.with_file_name(beside);
    if beside.exists() {
        fs::remove_dir_all(&beside).map_err(Error::io(&beside))?;
    }
    files::create_dir(&beside)?;
    let written = fill(base, merged, &beside).and_then(|folder| {
        fs::rename(&beside, out).map_err(Error::io(out))?;
        Ok(folder)
    });
    if written.is_err() {
        fs::remove_dir_all(&beside).ok();
    }
    written
}

/// Checks that nothing in `out` could be lost or mixed up.
///
/// # Errors
/// If it is there, and not an empty folder.
pub fn check_empty(out: &Path) -> Result<()> {
    let empty = fs::read_dir(out).map(|mut entries| entries.next().is_none());
    match empty {
        Ok(true) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Ok(false) => Err(Error::Usage(format!(
            "{} is not empty; name a folder that is not there yet",
            out.display()
        ))),
        Err(error) => Err(Error::io(out)(error)),
    }
}

/// Checks that the configuration leaves the weights what they seem to be: not quantised, and the
/// head its own where an adapter changes it. Readers of a folder whose configuration ties the head
/// take the embedding for it.
fn check_config(base: &Path, merged: &MergedAdapters) -> Result<()> {
    const HEAD: &str = "lm_head.weight";

    let path = base.join("config.json");
    let config = files::read_json(&path)?.unwrap_or_default();
    if config
        .get("quantization_config")
        .is_some_and(|config| !config.is_null())
    {
        let problem = "`quantization_config` says that the weights are quantised; merge into the \
                       base that is not";
        return Err(Error::model(&path, problem));
    }
    let tied = config.get("tie_word_embeddings") == Some(&true.into());
    if tied
        && merged
            .names()
            .any(|name| name.ends_with("embed_tokens.weight"))
    {
        let problem = "`tie_word_embeddings` is true, so a merged embedding would be the head as \
                       well; an adapter with an embedding of its own can't be merged";
        return Err(Error::model(&path, problem));
    }
    if tied && merged.names().any(|name| name == HEAD) {
        let problem = format!(
            "`tie_word_embeddings` is true, so a merged `{HEAD}` would not be read; an adapter of \
             a tied head can't be merged"
        );
        return Err(Error::model(&path, problem));
    }
    Ok(())
}

fn fill(base: &Path, merged: &MergedAdapters, dir: &Path) -> Result<MergedFolder> {
    let weights = HfFolder::open(base)?;
    let mut folder = MergedFolder::default();
    for shard in weights.shards() {
        let path = shard.path();
        let name = match path.file_name() {
            Some(name) if path.parent() == Some(base) => name,
            _ => return Err(Error::model(path, format!("is not in {}", base.display()))),
        };
        let mut changed = 0;
        shard.copy_to(&dir.join(name), |name| {
            if !merged.changes(name)? {
                return Ok(None);
            }
            changed += 1;
            Ok(merged.merge(name, &shard.load(name)?)?)
        })?;
        folder
            .weights
            .push((name.to_string_lossy().into(), changed));
    }
    merged.finish()?;

    // An index beside a single file is of shards that are not read.
    let indexed = !dir.join("model.safetensors").exists();
    let entries = fs::read_dir(base).map_err(Error::io(base))?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(Error::io(base))?;
    names.sort_unstable();
    for name in names {
        let (from, to) = (base.join(&name), dir.join(&name));
        let name = name.to_string_lossy().into_owned();
        if to.exists() {
            continue; // weights
        }
        if from.is_file() && (goes_along(&name) || name == INDEX && indexed) {
            fs::copy(&from, &to).map_err(Error::io(&to))?;
            folder.copied.push(name);
        } else {
            folder.left_out.push(name);
        }
    }
    Ok(folder)
}

/// Whether a file belongs to the configuration, the tokenizer or the licence of a model.
fn goes_along(name: &str) -> bool {
    const ENDINGS: [&str; 6] = [".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"];
    const OF_ADAPTERS: [&str; 2] = ["adapter_config.json", "automodel_peft_config.json"];
    let index = name.ends_with(".index.json");
    let licence = ["LICENSE", "LICENCE", "NOTICE"]
        .iter()
        .any(|start| name.starts_with(start));
    licence
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
            && !index
            && !OF_ADAPTERS.contains(&name)
}
