//! The tensors of an adapter, whichever files hold them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::Tensor;

use super::{
    entry::{Entry, bytes, row_major},
    header::Header,
    json::Json,
    pickle, zip,
};
use crate::{Error, Result};

/// No pickle of names and shapes, and no configuration, is longer.
pub(super) const LONGEST_TEXT: u64 = 32 << 20;

/// The tensors of one file or of several, found but not yet read.
pub(super) struct Tensors {
    files: Vec<(PathBuf, BufReader<File>)>,
    entries: BTreeMap<String, (usize, Entry)>,
    pub metadata: BTreeMap<String, String>,
}

impl Tensors {
    /// Opens a safetensors file, a file of `torch.save`, or the index of several.
    pub fn open(path: &Path) -> Result<Self> {
        let mut tensors = Self {
            files: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            tensors.add_shards(path)?;
        } else {
            tensors.add_file(path)?;
        }
        Ok(tensors)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name).map(|(_, entry)| entry)
    }

    /// Reads one tensor onto the CPU.
    pub fn read(&mut self, name: &str) -> Result<Tensor, String> {
        let (file, entry) = self.entries.get(name).ok_or("is missing")?;
        entry.read(&mut self.files[*file].1)
    }

    /// Adds the tensors of a file; returns their names.
    fn add_file(&mut self, path: &Path) -> Result<Vec<String>> {
        let (mut file, len) = open(path)?;
        let is_pickle = path.extension().is_some_and(|extension| extension == "bin");
        let found = if is_pickle {
            saved_by_torch(&mut file, len)
        } else {
            Header::read(&mut file, len).map(|header| {
                self.metadata.extend(header.metadata);
                header.tensors
            })
        };
        let found = found.map_err(|problems| checkpoint(path, problems))?;
        let index = self.files.len();
        let (mut names, mut twice) = (Vec::new(), Vec::new());
        for (name, entry) in found {
            names.push(name.clone());
            if let Some((other, _)) = self.entries.insert(name.clone(), (index, entry)) {
                let other = self.files[other].0.display();
                twice.push(format!("`{name}` stands in {other} as well"));
            }
        }
        self.files.push((path.to_path_buf(), file));
        if twice.is_empty() {
            Ok(names)
        } else {
            Err(checkpoint(path, twice))
        }
    }

    /// Adds the files that an index names, which must hold what it says and nothing else.
    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let place = |reason: String| Error::file(index, reason);
        let fields = Json::object(&read_text(index)?).map_err(place)?;
        let mut shards = BTreeMap::<String, Vec<String>>::new();
        let mut problems = Vec::new();
        let map = fields.iter().find(|(key, _)| key == "weight_map");
        let map = map.ok_or_else(|| place("has no `weight_map`".into()))?;
        for (name, file) in map.1.as_object().map_err(place)? {
            match file.as_text() {
                Ok(file) if is_plain(file) => {
                    shards
                        .entry(file.to_string())
                        .or_default()
                        .push(name.clone());
                }
                Ok(file) => problems.push(format!(
                    "`{name}` is said to be in {file:?}, which is no file of this folder"
                )),
                Err(problem) => problems.push(format!("`{name}`: {problem}")),
            }
        }
        if shards.is_empty() && problems.is_empty() {
            problems.push("`weight_map` is empty".into());
        }
        for (shard, expected) in shards {
            let mut found = match self.add_file(&index.with_file_name(&shard)) {
                Ok(found) => found,
                Err(error) => {
                    problems.push(error.to_string());
                    continue;
                }
            };
            found.sort();
            for name in &expected {
                if found.binary_search(name).is_err() {
                    problems.push(format!("`{name}` is missing from {shard}"));
                }
            }
            let expected: std::collections::HashSet<_> = expected.iter().collect();
            for name in found.iter().filter(|name| !expected.contains(name)) {
                problems.push(format!("`{name}` of {shard} is not in the index"));
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(checkpoint(index, problems))
        }
    }
}

/// The tensors of a file of `torch.save`.
fn saved_by_torch(
    file: &mut BufReader<File>,
    len: u64,
) -> Result<BTreeMap<String, Entry>, Vec<String>> {
    let one = |problem: String| vec![problem];
    let members = zip::members(file, len).map_err(|problem| {
        one(format!(
            "{problem}; files older than torch 1.6 must be saved anew"
        ))
    })?;
    let mut pickles = members.iter().filter_map(|(name, member)| {
        let archive = name.strip_suffix("data.pkl")?;
        (archive.is_empty() || archive.ends_with('/')).then_some((archive, *member))
    });
    let (Some((archive, member)), None) = (pickles.next(), pickles.next()) else {
        return Err(one(
            "holds not exactly one `data.pkl`, as torch.save writes".into(),
        ));
    };
    if let Some(order) = members.get(&format!("{archive}byteorder")) {
        let order = zip::read(file, order.start, order.len.min(16)).map_err(one)?;
        if order != b"little" {
            return Err(one("was saved on a machine of another byte order".into()));
        }
    }
    if member.len > LONGEST_TEXT {
        return Err(one(format!("has a pickle of {} bytes", member.len)));
    }
    let pickle = zip::read(file, member.start, member.len).map_err(one)?;
    let views = pickle::tensors(&pickle).map_err(one)?;

    let (mut tensors, mut problems, mut total) = (BTreeMap::new(), Vec::new(), 0_u64);
    for (name, view) in views {
        let storage = &view.storage;
        let size = storage.dtype.size_in_bytes() as u64;
        let Some(member) = members.get(&format!("{archive}data/{}", storage.key)) else {
            problems.push(format!(
                "`{name}` has no numbers: {archive}data/{} is missing",
                storage.key
            ));
            continue;
        };
        let entry = Entry {
            dtype: storage.dtype,
            shape: view.shape,
            strides: view.strides,
            start: member
                .start
                .saturating_add((view.offset as u64).saturating_mul(size)),
        };
        let end = entry.span().and_then(|span| span.checked_add(view.offset));
        if (storage.len as u64).checked_mul(size) != Some(member.len) {
            problems.push(format!(
                "`{name}` is said to have a storage of {} numbers, but that has {} bytes",
                storage.len, member.len
            ));
        } else if row_major(&entry.shape).is_none() {
            problems.push(format!(
                "`{name}` claims tensors of shape {:?}, beyond any memory",
                entry.shape
            ));
        } else if end.is_none_or(|end| end > storage.len) {
            problems.push(format!(
                "`{name}` of shape {:?} reaches beyond its storage of {} numbers",
                entry.shape, storage.len
            ));
        } else {
            total = total.saturating_add(entry.bytes().unwrap_or(u64::MAX));
            if tensors.insert(name.clone(), entry).is_some() {
                problems.push(format!("`{name}` stands in the file twice"));
            }
        }
    }
    // Several tensors may lie in one storage, but a small file must not stand for a large one.
    if total > len.saturating_mul(4) {
        problems.push(format!(
            "claims tensors of {total} bytes in a file of {len}"
        ));
    }
    if problems.is_empty() {
        Ok(tensors)
    } else {
        Err(problems)
    }
}

/// Opens a plain file; returns its length too.
fn open(path: &Path) -> Result<(BufReader<File>, u64)> {
    let metadata = fs::metadata(path).map_err(|error| Error::file(path, error))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "is no plain file"));
    }
    let file = File::open(path).map_err(|error| Error::file(path, error))?;
    Ok((BufReader::new(file), metadata.len()))
}

/// Reads a file of JSON.
pub(super) fn read_text(path: &Path) -> Result<Vec<u8>> {
    let (mut file, len) = open(path)?;
    if len > LONGEST_TEXT {
        let reason = format!("has {len} bytes; no more than {LONGEST_TEXT} are read");
        return Err(Error::file(path, reason));
    }
    zip::read(&mut file, 0, len).map_err(|reason| Error::file(path, reason))
}

/// Whether a name stays in its folder.
fn is_plain(file: &str) -> bool {
    !file.is_empty() && file != "." && file != ".." && !file.contains(['/', '\\', ':', '\0'])
}

fn checkpoint(file: &Path, problems: Vec<String>) -> Error {
    Error::Checkpoint {
        file: file.to_path_buf(),
        problems,
    }
}

/// The bytes of a tensor.
pub(super) fn size(tensor: &Tensor) -> u64 {
    bytes(tensor.dims(), tensor.dtype()).unwrap_or(u64::MAX)
}
