//! The Hopper kernel on a CPU: `gemm.cu` as it is, between headers that do what the card's instructions do.
//!
//! No card is needed to see that its threads do not wait for each other forever, that they wait for what the card does for
//! them, and that `S` and the output are right. Such a run sees nothing of time, nor of what fences order.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use half::bf16;

use crate::dropout::Mask;
use crate::gemm::Product;
use crate::hopper::TILE;
use crate::low::Tiling;
use crate::shares::Shares;
use crate::side;
use crate::tail::Tail;

mod cases;

const SCALE: f64 = 0.375;

/// A product of `[rows, depth]` with `cols` columns on a card that holds `clusters`.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    depth: usize,
    cols: usize,
    clusters: usize,
}

/// The kernel's options.
#[derive(Clone, Copy, Debug)]
struct Options {
    product: Product,
    ranks: usize,
    /// Of the input forward, of the adapter's part of the output backward.
    masked: bool,
    tail: bool,
}

/// A program, deleted with this.
struct Emulator {
    path: PathBuf,
    options: Options,
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Emulator {
    /// Compiled by `$CXX`, which must be there, or by `c++`; none where there is no such compiler.
    fn compile(options: Options) -> Option<Self> {
        let Options {
            product,
            ranks,
            masked,
            tail,
        } = options;
        let backward = product == Product::Backward;
        let asked = std::env::var("CXX").ok();
        let mut words = asked.as_deref().unwrap_or("c++").split_whitespace();
        let name = format!(
            "lora-emulator-{}-{product:?}-{ranks}-{masked}-{tail}",
            std::process::id()
        );
        let path = std::env::temp_dir().join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/emulator/gemm.cpp");
        let defines = [
            ("DTYPE", 1),
            ("ALIGNED", 1),
            ("BACKWARD", usize::from(backward)),
            ("DROPOUT", if masked && backward { 2 } else { 0 }),
            ("RANK_STEPS", ranks / 16),
            ("DOWN", if masked && !backward { 2 } else { 1 }),
            ("SIDE", 0),
            ("TAIL", usize::from(tail)),
        ];
        let compiled = Command::new(words.next().expect("CXX names a compiler"))
            .args(words)
            .args(["-std=c++17", "-O2", "-w"])
            .args(defines.map(|(name, value)| format!("-D{name}={value}")))
            .args([OsStr::new("-o"), path.as_os_str(), source.as_os_str()])
            .output();
        let output = match (compiled, asked) {
            (Ok(output), _) => output,
            (Err(error), Some(asked)) => panic!("CXX is {asked}: {error}"),
            (Err(_), None) => return None,
        };
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{options:?}: {log}");
        Some(Self { path, options })
    }

    /// S and the output.
    fn run(&self, case: Case, mask: Mask, inputs: &Inputs) -> (Vec<bf16>, Vec<bf16>) {
        let Case {
            rows,
            depth,
            cols,
            clusters,
        } = case;
        let (tile_rows, tile_cols) = (rows.div_ceil(TILE), cols.div_ceil(TILE));
        let tiles = tile_rows * tile_cols;
        let tiling = |busy| Tiling {
            product: self.options.product,
            rows: tile_rows,
            cols: tile_cols,
            busy,
            spare: 0,
        };
        let (tail, busy) = if self.options.tail {
            let tail = Tail::new(tiles, clusters, depth).expect("a tail");
            ((tail.first, tail.split), clusters)
        } else {
            ((tiles, 1), side::busy(tiles, clusters))
        };
        let shares = Shares::new(tiling(busy), depth);
        assert!(shares.end <= tail.0, "{case:?}: tiles of the tail make S");
        let arguments = [
            rows,
            depth,
            cols,
            busy,
            shares.count,
            shares.window,
            shares.early,
            shares.delay,
            shares.at_once,
            shares.stride,
        ]
        .map(|number| number.to_string());
        let rest = [
            SCALE.to_string(),
            tail.0.to_string(),
            tail.1.to_string(),
            mask.step.to_string(),
            mask.seed.to_string(),
            mask.site.to_string(),
            mask.threshold.to_string(),
            mask.scale.to_string(),
        ];
        let mut child = Command::new(&self.path)
            .args(arguments.iter().chain(&rest))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let mut stdin = child.stdin.take().expect("piped");
        let bytes: Vec<u8> = inputs
            .all()
            .flat_map(|value| value.to_bits().to_le_bytes())
            .collect();
        let writer = thread::spawn(move || stdin.write_all(&bytes));
        let output = child.wait_with_output().expect("the emulator ends");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{:?} {case:?} {shares:?}: {log}",
            self.options
        );
        writer
            .join()
            .expect("the input was written")
            .expect("the input was read");
        let mut values: Vec<bf16> = output
            .stdout
            .chunks_exact(2)
            .map(|two| bf16::from_bits(u16::from_le_bytes([two[0], two[1]])))
            .collect();
        let out = values.split_off(rows * self.options.ranks);
        assert_eq!(out.len(), rows * cols);
        (values, out)
    }
}

/// Random matrices, as the launcher has them: W and p are transposed backward, and p and `a`, which makes q, have padded
/// rows there.
struct Inputs {
    x: Vec<bf16>,
    w: Vec<bf16>,
    p: Vec<bf16>,
    p_cols: usize,
    a: Vec<bf16>,
    a_cols: usize,
    bias: Vec<bf16>,
}

impl Inputs {
    fn new(case: Case, product: Product, ranks: usize) -> Self {
        let Case {
            rows, depth, cols, ..
        } = case;
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |len: usize| {
            (0..len)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    bf16::from_f64((state >> 40) as f64 / f64::from(1 << 23) - 1.0)
                })
                .collect::<Vec<_>>()
        };
        let a_cols = depth.next_multiple_of(8);
        let (p_rows, p_cols) = match product {
            Product::Forward => (cols, ranks),
            Product::Backward => (ranks, cols.next_multiple_of(8)),
        };
        Self {
            x: random(rows * depth),
            w: random(cols * depth),
            p: random(p_rows * p_cols),
            p_cols,
            a: random(ranks * a_cols),
            a_cols,
            bias: random(cols),
        }
    }

    fn all(&self) -> impl Iterator<Item = bf16> + '_ {
        let Self {
            x, w, p, a, bias, ..
        } = self;
        x.iter().chain(w).chain(p).chain(a).chain(bias).copied()
    }
}
