//! Adapters apart from models of ours: merged into the weights of others, and on the command line.

mod command_line;
mod merge_folder;
mod merged;
mod settings;
mod transformers;

use std::path::PathBuf;

/// A path among the golden files.
fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(path)
}
