//! Hopper's kernels on a CPU: `gemm.cu`, `sweep.cu`, `decode.cu` and `shrink_ring.cu` as they are, between headers that do what the
//! card's instructions do.
//!
//! No card is needed to see that their threads do not wait for each other forever, that they wait for what the card does for
//! them, that no copy goes to where a load may be on its way, and that the results are right. Such a run sees nothing of time, nor
//! of what other fences order.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use half::bf16;

use crate::dropout::{Dropout, Mask, Place};

mod decode;
mod gemm;
mod shrink_ring;
mod sweep;

/// Of S.
const SCALE: f64 = 0.375;

/// A kernel with its options, deleted with this.
struct Program {
    path: PathBuf,
    name: String,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Program {
    /// `source` of the folder `emulator`, compiled by `$CXX`, which must be there, or by `c++`; none where there is no such
    /// compiler.
    fn compile(source: &str, defines: &[(&str, usize)]) -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let asked = std::env::var("CXX").ok();
        let mut words = asked.as_deref().unwrap_or("c++").split_whitespace();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let file = format!("lora-emulator-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(file);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/emulator");
        let defines = [&[("DTYPE", 1), ("ALIGNED", 1)], defines].concat();
        let name = format!("{source} {defines:?}");
        let compiled = Command::new(words.next().expect("CXX names a compiler"))
            .args(words)
            .args(["-std=c++17", "-O2", "-w"])
            .args(
                defines
                    .iter()
                    .map(|(name, value)| format!("-D{name}={value}")),
            )
            .args([
                OsStr::new("-o"),
                path.as_os_str(),
                folder.join(source).as_os_str(),
            ])
            .output();
        let output = match (compiled, asked) {
            (Ok(output), _) => output,
            (Err(error), Some(asked)) => panic!("CXX is {asked}: {error}"),
            (Err(_), None) => {
                eprintln!("skipped: no C++ compiler here, neither $CXX nor c++");
                return None;
            }
        };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {log}");
        Some(Self { path, name })
    }

    /// The output.
    fn run(&self, arguments: &[f64], input: Vec<u8>) -> Output {
        let mut child = Command::new(&self.path)
            .args(arguments.iter().map(f64::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let mut stdin = child.stdin.take().expect("piped");
        let writer = thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().expect("the emulator ends");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{} {arguments:?}: {log}",
            self.name
        );
        writer
            .join()
            .expect("the input was written")
            .expect("the input was read");
        Output(output.stdout)
    }
}

/// What a program has written, matrix by matrix.
struct Output(Vec<u8>);

impl Output {
    /// The next `N` bytes, `len` times.
    fn take<const N: usize>(&mut self, len: usize) -> Vec<[u8; N]> {
        assert!(self.0.len() >= N * len, "the output is too short");
        let rest = self.0.split_off(N * len);
        let taken = std::mem::replace(&mut self.0, rest);
        taken.as_chunks().0.to_vec()
    }

    fn halves(&mut self, len: usize) -> Vec<bf16> {
        let bits = self.take(len).into_iter().map(u16::from_le_bytes);
        bits.map(bf16::from_bits).collect()
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        self.take(len).into_iter().map(f32::from_le_bytes).collect()
    }

    /// Nothing is left.
    fn end(self) {
        assert!(self.0.is_empty(), "the output is too long");
    }
}

/// What drops a quarter, where `masked`, or nothing, and its mask.
fn dropout(masked: bool) -> (Dropout, Mask) {
    let p = if masked { 0.25 } else { 0.0 };
    let dropout = Dropout::new(Place::Pre, p, 0x1234_5678_9abc, 5, 7).expect("a probability");
    let mask = Dropout::at(Some(dropout), Place::Pre).unwrap_or(Mask {
        scale: 1.0,
        ..Mask::default()
    });
    (dropout, mask)
}

/// A mask as a program takes it.
fn numbers(mask: Mask) -> [f64; 5] {
    let Mask {
        step,
        seed,
        site,
        threshold,
        scale,
    } = mask;
    [
        step as f64,
        seed.into(),
        site.into(),
        threshold.into(),
        scale.into(),
    ]
}

/// Numbers in [-1, 1) that a bf16 holds.
fn random(state: &mut u64, len: usize) -> Vec<bf16> {
    (0..len)
        .map(|_| {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            bf16::from_f64((*state >> 40) as f64 / f64::from(1 << 23) - 1.0)
        })
        .collect()
}
const SEED: u64 = 0x2545_f491_4f6c_dd1d;

fn bytes<'a>(values: impl IntoIterator<Item = &'a bf16>) -> Vec<u8> {
    values
        .into_iter()
        .flat_map(|value| value.to_bits().to_le_bytes())
        .collect()
}

/// qᵀ · z of `z` in rows of `cols` and q in rows of `ranks`: `[ranks, cols]`.
fn across(q: &[bf16], ranks: usize, z: &[f64], cols: usize) -> Vec<f64> {
    let mut sums = vec![0.0; ranks * cols];
    for (q, z) in q.chunks(ranks).zip(z.chunks(cols)) {
        for (sums, q) in sums.chunks_mut(cols).zip(q) {
            for (sum, z) in sums.iter_mut().zip(z) {
                *sum += q.to_f64() * z;
            }
        }
    }
    sums
}

/// Whether `found` is the sum `expected`, but for the roundings of f32.
fn is_close_sum(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-4 * (1.0 + expected.abs())
}

/// Whether `found` is `expected`, but for the rounding of a bf16.
fn is_close(found: bf16, expected: f64) -> bool {
    (found.to_f64() - expected).abs() <= 0.006 * (1.0 + expected.abs())
}
