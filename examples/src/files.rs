//! Files that are either old or new, never half written.

use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Write;
use std::path::Path;

use crate::Error;
use crate::Result;

/// Writes a file beside `path`, flushes it to the disk, then renames it to `path`.
///
/// # Errors
/// What `fill` returns, or an [`Error::Io`] that names `path`; the old file is then still there.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let mut beside: OsString = path.as_os_str().to_owned();
    beside.push(".tmp"); // one name, so that what a killed process left is overwritten
    let beside = Path::new(&beside);
    let written = File::create(beside)
        .map_err(Error::io(path))
        .and_then(|file| {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            fill(&mut out)?;
            let file = out
                .into_inner()
                .map_err(|e| Error::io(path)(e.into_error()))?;
            file.sync_all().map_err(Error::io(path))?;
            fs::rename(beside, path).map_err(Error::io(path))
        });
    if written.is_err() {
        fs::remove_file(beside).ok();
    }
    written
}

/// [`write_atomically`] for contents that are already in memory.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |out| out.write_all(bytes).map_err(Error::io(path)))
}

/// Creates a folder and those above it.
pub fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io(dir))
}

/// Reads a JSON object; `None` where there is no such file.
pub fn read_json(path: &Path) -> Result<Option<serde_json::Map<String, serde_json::Value>>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| Error::Json {
            path: path.into(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_bytes(&path, b"old").unwrap();
        let failed = write_atomically(&path, |out| {
            out.write_all(b"half of the ne").map_err(Error::io(&path))?;
            Err(Error::Usage("killed".into()))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
