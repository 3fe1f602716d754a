//! Compiled kernels: NVRTC in front of a cache on disk.
//!
//! An entry is keyed by source, NVRTC version, architecture and options, all of which stand in the
//! file; a file that is cut short, altered or of another key is compiled again and replaced.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::nvrtc::{result, sys};

use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"loracub1";

/// What to compile.
pub(crate) struct Request<'a> {
    pub kernel: &'static str,
    pub source: &'a str,
    pub arch: &'a str,
    pub defines: &'a [(&'static str, u32)],
}

/// Compiles kernels and remembers them.
#[derive(Debug)]
pub(crate) struct Compiler {
    version: (i32, i32),
    dir: Option<PathBuf>,
}

impl Compiler {
    /// Opens NVRTC. Cubins are kept in `dir`, or nowhere.
    pub fn new(dir: Option<PathBuf>) -> Result<Self> {
        // cudarc panics where the library is missing; the panic becomes an error with a remedy.
        let version = panic::catch_unwind(|| {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: both pointers are valid for writes of an int.
            unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
                .result()
                .map(|()| (major, minor))
        });
        match version {
            Ok(Ok(version)) => Ok(Self { version, dir }),
            Ok(Err(e)) => Err(Error::MissingLibrary {
                library: "nvrtc",
                reason: e.to_string(),
            }),
            Err(_) => Err(Error::MissingLibrary {
                library: "nvrtc",
                reason: "not found".into(),
            }),
        }
    }

    /// The cubin of `request`, from the cache if it is there.
    pub fn cubin(&self, request: &Request) -> Result<Vec<u8>> {
        let options = options(request);
        let key = self.key(request, &options);
        let path = self.dir.as_ref().map(|dir| {
            dir.join(format!(
                "{}-{:016x}.cubin",
                request.kernel,
                fnv(key.as_bytes())
            ))
        });
        if let Some(cubin) = path.as_deref().and_then(|path| read_entry(path, &key)) {
            return Ok(cubin);
        }
        let (cubin, _) = self.compile(request, &options)?;
        if let Some(path) = path {
            // A cache that cannot be written costs time, never the result.
            let _ = write_entry(&path, &key, &cubin);
        }
        Ok(cubin)
    }

    fn key(&self, request: &Request, options: &[String]) -> String {
        let (major, minor) = self.version;
        let source = fnv(request.source.as_bytes());
        format!(
            "{} {source:016x} nvrtc {major}.{minor} {}",
            request.kernel,
            options.join(" ")
        )
    }

    /// Compiles afresh and returns what the assembler says of registers and spills too.
    pub fn report(&self, request: &Request) -> Result<(Vec<u8>, String)> {
        let mut options = options(request);
        options.push("--ptxas-options=-v".into());
        self.compile(request, &options)
    }

    fn compile(&self, request: &Request, options: &[String]) -> Result<(Vec<u8>, String)> {
        let fail = |log: String| Error::Compile {
            kernel: request.kernel,
            arch: request.arch.to_string(),
            nvrtc: format!("{}.{}", self.version.0, self.version.1),
            log,
        };
        let source = CString::new(request.source).map_err(|e| fail(e.to_string()))?;
        let program =
            Program(result::create_program(&source, None).map_err(|e| fail(e.to_string()))?);
        // SAFETY: the program was just created and lives until the end of this function.
        if let Err(e) = unsafe { result::compile_program(program.0, options) } {
            return Err(fail(format!("{e}\n{}", program.log())));
        }
        let cubin = program.cubin().map_err(|e| fail(e.to_string()))?;
        Ok((cubin, program.log()))
    }
}

/// `$LORA_KERNELS_CACHE`, else the user's cache folder.
pub(crate) fn default_dir() -> Option<PathBuf> {
    let of = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    of("LORA_KERNELS_CACHE")
        .or_else(|| of("XDG_CACHE_HOME").map(|dir| dir.join("lora-kernels")))
        .or_else(|| of("HOME").map(|dir| dir.join(".cache/lora-kernels")))
}

fn options(request: &Request) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={}", request.arch),
        "--std=c++17".to_string(),
        // Lambdas over types carry no annotation of their own.
        "--device-as-default-execution-space".to_string(),
    ];
    options.extend(
        request
            .defines
            .iter()
            .map(|(name, value)| format!("-D{name}={value}")),
    );
    options
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program is alive until drop.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log
            .into_iter()
            .map(|c| c as u8)
            .take_while(|&c| c != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program is alive and `size` is valid for a write.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result()?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) }.result()?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `create_program` and destroyed once, here.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Layout: magic, key length, key, checksum of the cubin, cubin.
fn read_entry(path: &Path, key: &str) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (found, rest) = rest.split_at_checked(length)?;
    let (checksum, cubin) = rest.split_first_chunk::<8>()?;
    let intact = found == key.as_bytes() && u64::from_le_bytes(*checksum) == fnv(cubin);
    intact.then(|| cubin.to_vec())
}

/// Writes beside and renames, so that a reader sees a whole file or none.
fn write_entry(path: &Path, key: &str, cubin: &[u8]) -> std::io::Result<()> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let beside = path.with_extension(format!("{}-{serial}.tmp", std::process::id()));
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let written = fs::File::create(&beside).and_then(|mut file| {
        file.write_all(MAGIC)?;
        file.write_all(&(key.len() as u64).to_le_bytes())?;
        file.write_all(key.as_bytes())?;
        file.write_all(&fnv(cubin).to_le_bytes())?;
        file.write_all(cubin)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&beside, path));
    if renamed.is_err() {
        let _ = fs::remove_file(&beside);
    }
    renamed
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| {
        (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_and_foreign_entries_are_not_read() -> std::io::Result<()> {
        let dir = std::env::temp_dir().join(format!("lora-kernels-{}", std::process::id()));
        let path = dir.join("k.cubin");
        write_entry(&path, "key", b"some machine code")?;
        assert_eq!(
            read_entry(&path, "key").as_deref(),
            Some(b"some machine code".as_slice())
        );
        assert_eq!(read_entry(&path, "another"), None);
        let whole = fs::read(&path)?;
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut])?;
            assert_eq!(read_entry(&path, "key"), None, "cut at {cut}");
        }
        let mut altered = whole.clone();
        *altered.last_mut().unwrap() ^= 1;
        fs::write(&path, &altered)?;
        assert_eq!(read_entry(&path, "key"), None);
        assert_eq!(fs::read_dir(&dir)?.count(), 1, "no temporary file stays");
        fs::remove_dir_all(dir)
    }
}
