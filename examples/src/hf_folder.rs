//! Hugging Face model folders: `config.json`, `model.safetensors` (one file or shards).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;

use candle_core::DType;
use candle_core::Device;
use candle_core::Shape;
use candle_core::Tensor;
use safetensors::tensor::Metadata;
use safetensors::tensor::TensorInfo;
use serde_json::Value;

use crate::Error;
use crate::Result;
use crate::config::Config;
use crate::config::token_ids;
use crate::files;
use crate::weights::Weights;

/// The safetensors files of a model folder.
pub struct HfFolder {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Name -> index into `shards`.
    names: BTreeMap<String, usize>,
}

impl HfFolder {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// If neither is there, or a header is damaged; the error names the file.
    pub fn open(dir: &Path) -> Result<Self> {
        let index_path = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let files = if single.exists() {
            vec![single]
        } else if let Some(index) = files::read_json(&index_path)? {
            let map = index.get("weight_map").and_then(Value::as_object);
            let map = map.ok_or_else(|| Error::model(&index_path, "has no `weight_map` object"))?;
            let mut files: Vec<&str> = map.values().filter_map(Value::as_str).collect();
            files.sort_unstable();
            files.dedup();
            files.into_iter().map(|file| dir.join(file)).collect()
        } else {
            return Err(Error::model(
                dir,
                "holds neither model.safetensors nor model.safetensors.index.json",
            ));
        };
        let shards = files
            .iter()
            .map(|file| Shard::open(file))
            .collect::<Result<Vec<_>>>()?;
        let names = shards
            .iter()
            .enumerate()
            .flat_map(|(i, shard)| {
                shard
                    .metadata
                    .offset_keys()
                    .into_iter()
                    .map(move |name| (name, i))
            })
            .collect();
        Ok(Self {
            dir: dir.into(),
            shards,
            names,
        })
    }

    /// The files, in the order of their names.
    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Reads `config.json`, and the end tokens of `generation_config.json` where it names some.
    ///
    /// # Errors
    /// If the file is missing, or as [`Config::from_json`].
    pub fn read_config(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let json = files::read_json(&path)?.ok_or_else(|| Error::model(&path, "no such file"))?;
        let mut config = Config::from_json(json)?;
        if let Some(generation) = files::read_json(&dir.join("generation_config.json"))? {
            for id in token_ids(generation.get("eos_token_id")) {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }
}

impl Weights for HfFolder {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Shape> {
        let info = self.shards[*self.names.get(name)?].metadata.info(name)?;
        Some(info.shape.clone().into())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        match self.names.get(name) {
            Some(&shard) => self.shards[shard].load(name),
            None => Err(Error::model(
                &self.dir,
                format!("there is no tensor `{name}`"),
            )),
        }
    }
}

/// One safetensors file: the header in memory, the tensors on the disk.
pub(crate) struct Shard {
    path: PathBuf,
    file: Mutex<File>,
    metadata: Metadata,
    /// Where the first tensor starts, in bytes.
    data: u64,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let damaged =
            |problem: &str| Error::model(path, format!("damaged safetensors file: {problem}"));
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut size = [0; 8];
        file.read_exact(&mut size)
            .map_err(|_| damaged("too short"))?;
        let size = u64::from_le_bytes(size);
        if size > length.saturating_sub(8) {
            return Err(damaged("the header is longer than the file"));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(Error::io(path))?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| damaged(&e.to_string()))?;
        if 8 + size + metadata.data_len() as u64 != length {
            return Err(damaged(
                "its length is not what the header says; copy or download it again",
            ));
        }
        Ok(Self {
            path: path.into(),
            file: Mutex::new(file),
            metadata,
            data: 8 + size,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a copy of the file to `path`, with other numbers in the tensors for which `replaced`
    /// has some. It is asked for one after the other; type and shape must stay.
    pub(crate) fn copy_to(
        &self,
        path: &Path,
        mut replaced: impl FnMut(&str) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let mut file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let mut tensors: Vec<_> = self.metadata.tensors().into_iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        files::write_atomically(path, |out| {
            copy(&mut file, self.data, out).map_err(Error::io(path))?;
            let mut at = 0;
            for (name, info) in tensors {
                let (from, to) = info.data_offsets;
                if from != at {
                    let problem = format!("damaged safetensors file: a gap before `{name}`");
                    return Err(Error::model(&self.path, problem));
                }
                at = to;
                let Some(tensor) = replaced(&name)? else {
                    copy(&mut file, (to - from) as u64, out).map_err(Error::io(path))?;
                    continue;
                };
                let dtype = DType::try_from(info.dtype)?;
                if tensor.dims() != info.shape || tensor.dtype() != dtype {
                    let problem = format!("`{name}` can't become another type or shape");
                    return Err(Error::model(&self.path, problem));
                }
                tensor.write_bytes(out)?;
                file.seek_relative((to - from) as i64)
                    .map_err(Error::io(&self.path))?;
            }
            Ok(())
        })
    }

    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        let absent = || Error::model(&self.path, format!("there is no tensor `{name}`"));
        let info = self.metadata.info(name).ok_or_else(absent)?;
        let dtype = DType::try_from(info.dtype)?;
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        // A reader that panicked left nothing behind: every read seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.data + from as u64))
            .map_err(Error::io(&self.path))?;
        file.read_exact(&mut bytes).map_err(Error::io(&self.path))?;
        Ok(Tensor::from_raw_buffer(
            &bytes,
            dtype,
            &info.shape,
            &Device::Cpu,
        )?)
    }
}

/// Copies exactly `length` bytes.
fn copy(from: &mut File, length: u64, to: &mut impl Write) -> io::Result<()> {
    match io::copy(&mut from.take(length), to)? {
        copied if copied == length => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes a safetensors file without holding more than one of its tensors.
///
/// `tensors` gives each name and shape; `load` is asked for them in that order.
///
/// # Errors
/// What `load` returns, a shape that is not the announced one, or an I/O error on `path`.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, Shape)],
    dtype: DType,
    mut load: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut offset = 0;
    let infos = tensors.iter().map(|(name, shape)| {
        let start = offset;
        offset += shape.elem_count() * dtype.size_in_bytes();
        let info = TensorInfo {
            dtype: dtype.into(),
            shape: shape.dims().to_vec(),
            data_offsets: (start, offset),
        };
        (name.clone(), info)
    });
    let note = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(note.into_iter().collect()), infos.collect())
        .map_err(|e| Error::model(path, e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| Error::Json {
        path: path.into(),
        source,
    })?;
    header.resize(header.len().next_multiple_of(8), b' ');
    files::write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(Error::io(path))?;
        out.write_all(&header).map_err(Error::io(path))?;
        for (name, shape) in tensors {
            let tensor = load(name)?;
            if tensor.shape() != shape {
                return Err(Error::model(
                    path,
                    format!(
                        "`{name}` has shape {:?}, not {:?}",
                        tensor.dims(),
                        shape.dims()
                    ),
                ));
            }
            tensor.to_dtype(dtype)?.write_bytes(out)?;
        }
        Ok(())
    })
}
