//! Files that are whole or not there.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use crate::{Error, Result};

/// Writes `bytes` beside `path` and then renames: a reader sees the old file or the new one.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    // Always the same name: what a killed process leaves, the next one overwrites.
    name.push(".tmp");
    let beside = path.with_file_name(name);
    let written = File::create(&beside)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, path));
    written.map_err(|error| {
        // Best effort: the error that counts is the one above.
        let _ = fs::remove_file(&beside);
        Error::file(path, format!("can't be written: {error}"))
    })
}
