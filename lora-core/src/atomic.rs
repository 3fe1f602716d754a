//! Files that are whole or not there.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A file that is written but does not stand in its place yet. Dropped, it is gone.
pub(crate) struct Staged {
    path: PathBuf,
    beside: PathBuf,
}

impl Staged {
    /// Writes a file beside `path`.
    pub fn write(
        path: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        // Always the same name: what a killed process leaves, the next one overwrites.
        name.push(".tmp");
        let staged = Self {
            path: path.to_path_buf(),
            beside: path.with_file_name(name),
        };
        // What is there may be a link to somewhere else: it goes, and what it points to stays.
        let _ = fs::remove_file(&staged.beside);
        let written = File::create_new(&staged.beside).and_then(|file| {
            let mut file = BufWriter::new(file);
            fill(&mut file)?;
            file.flush()?;
            file.get_ref().sync_all()
        });
        match written {
            Ok(()) => Ok(staged),
            Err(error) => Err(cant_be_written(path, &error)),
        }
    }

    /// Where it stands now.
    pub fn beside(&self) -> &Path {
        &self.beside
    }

    /// Puts the file into its place.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.beside, &self.path).map_err(|error| cant_be_written(&self.path, &error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Best effort, and in vain after a rename: the error that counts is told elsewhere.
        let _ = fs::remove_file(&self.beside);
    }
}

fn cant_be_written(path: &Path, error: &io::Error) -> Error {
    Error::file(path, format!("can't be written: {error}"))
}
