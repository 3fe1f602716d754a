//! What the fuzz targets share: a folder in memory or on disk that is filled and read.

use std::{fs, path::PathBuf, sync::OnceLock};

use lora_core::adapter::{AdapterWeights, Profile};

#[path = "../../files/archive.rs"]
pub mod archive;

/// A configuration that agrees with [`WEIGHTS`].
pub const CONFIG: &[u8] =
    include_bytes!("../../files/fixtures/plain_safetensors/adapter_config.json");
/// A small adapter.
pub const WEIGHTS: &[u8] =
    include_bytes!("../../files/fixtures/plain_safetensors/adapter_model.safetensors");

/// This process's folder.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = PathBuf::from("/dev/shm");
        let root = if memory.is_dir() {
            memory
        } else {
            std::env::temp_dir()
        };
        root.join(format!("lora-fuzz-{}", std::process::id()))
    })
}

/// Reads a folder of these files. What can be read and written must be readable again.
pub fn read(files: &[(&str, &[u8])]) {
    let dir = folder();
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).expect("a folder for the files");
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).expect("a file in the folder");
    }
    if let Ok(adapter) = AdapterWeights::read(dir) {
        let again = dir.join("again");
        if adapter.write(&again, Profile::Peft).is_ok() {
            let read = AdapterWeights::read(&again).expect("our own file");
            assert!(read.layers.keys().eq(adapter.layers.keys()));
        }
    }
    let _ = fs::remove_dir_all(dir);
}
