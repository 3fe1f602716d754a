//! Compiles every kernel for an architecture, without a device: what continuous integration runs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::cubin::{Compiler, Request};
use crate::error::{Error, Result};
use crate::kernels::{Kernel, lock};
use crate::shrink_ring::Teams;
use crate::{decode, sweep};

/// Compiles the kernels that can run on `arch` (for example `sm_90a`) with NVRTC and returns how many.
///
/// Kernels differ only in their options; f16 is compiled with one set, since it shares its code with
/// bf16.
///
/// # Errors
/// [`Error::Compile`] for the first kernel that NVRTC rejects, that spills more than 32 bytes or whose
/// asynchronous products the assembler had to serialize.
pub fn compile_all(arch: &str) -> Result<usize> {
    let compiler = Compiler::new(None)?;
    let instances = instances(arch);
    let (next, failure) = (AtomicUsize::new(0), std::sync::Mutex::new(None));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((kernel, defines)) =
                    instances.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    if let Err(e) = compile(&compiler, arch, *kernel, defines) {
                        lock(&failure).get_or_insert(e);
                        next.store(instances.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    failure
        .into_inner()
        .unwrap_or_default()
        .map_or(Ok(instances.len()), Err)
}

/// A few words kept aside once a tile cost nothing; the assembler does so where a kernel uses all
/// registers it may have.
const TOLERATED_SPILL: u32 = 32;

type Defines = Vec<(&'static str, u32)>;

fn compile(compiler: &Compiler, arch: &str, kernel: Kernel, defines: &Defines) -> Result<()> {
    let request = Request {
        kernel: kernel.name(),
        source: kernel.source(),
        arch,
        defines,
    };
    let (_, log) = compiler.report(&request)?;
    let spilled = log.lines().filter_map(spill_stores).max();
    // C7510 and its neighbours: wgmma waits after every step. C7508: setmaxnreg was ignored.
    let serialized = ["C7508", "C7509", "C7510", "C7511", "C7514", "C7515"]
        .iter()
        .any(|code| log.contains(code));
    let what = match spilled {
        None => "the assembler reported nothing",
        Some(bytes) if bytes > TOLERATED_SPILL => "registers spill",
        _ if serialized => "asynchronous products are serialized",
        _ => return Ok(()),
    };
    Err(Error::Compile {
        kernel: kernel.name(),
        arch: arch.into(),
        nvrtc: String::new(),
        log: format!("{what} with {defines:?}\n{log}"),
    })
}

/// Bytes from a line like `8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads`.
fn spill_stores(line: &str) -> Option<u32> {
    line.split(" bytes spill stores")
        .next()
        .filter(|head| head.len() < line.len())?
        .rsplit(' ')
        .next()?
        .parse()
        .ok()
}

fn instances(arch: &str) -> Vec<(Kernel, Defines)> {
    let mut all = Vec::new();
    for dtype in [0, 1] {
        let base = |aligned: u32| vec![("DTYPE", dtype), ("ALIGNED", aligned)];
        for flag in [0, 1] {
            all.push((Kernel::Pack, [base(1), vec![("SOURCE_F32", flag)]].concat()));
        }
        all.push((Kernel::Reduce, base(1)));
        for (aligned, dropout) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let masked = [base(aligned), vec![("DROPOUT", dropout)]].concat();
            for row_tiles in [1, 4] {
                all.push((
                    Kernel::Expand,
                    [masked.clone(), vec![("MT", row_tiles)]].concat(),
                ));
            }
            for rank_tile in [16, 32, 64] {
                let ranked = [masked.clone(), vec![("RT", rank_tile)]].concat();
                all.push((Kernel::Outer, ranked.clone()));
                for (row_tiles, warps) in shrink_shapes(dtype, rank_tile) {
                    all.push((
                        Kernel::Shrink,
                        [ranked.clone(), vec![("MT", row_tiles), ("WARPS", warps)]].concat(),
                    ));
                }
            }
        }
    }
    let f16 = [("DTYPE", 2), ("ALIGNED", 1), ("DROPOUT", 1)];
    all.push((Kernel::Pack, [&f16[..2], &[("SOURCE_F32", 1)]].concat()));
    all.push((Kernel::Reduce, f16[..2].to_vec()));
    all.push((Kernel::Expand, [&f16[..], &[("MT", 4)]].concat()));
    all.push((Kernel::Outer, [&f16[..], &[("RT", 16)]].concat()));
    all.push((
        Kernel::Shrink,
        [&f16[..], &[("RT", 16), ("MT", 2), ("WARPS", 8)]].concat(),
    ));
    if arch == "sm_90a" {
        let base = [("DTYPE", 1), ("ALIGNED", 1)];
        all.push((Kernel::Bits, base.to_vec()));
        let decoded = [1, 2, 4, 8, 16]
            .into_iter()
            .flat_map(|tiles| [16, 32, 64].map(|ranks| (tiles, ranks)));
        for (tiles, ranks) in decoded.filter(|&(tiles, ranks)| decode::fits(tiles, ranks)) {
            for adapter_f32 in [0, 1] {
                let options = [
                    ("NT", tiles as u32),
                    ("RT", ranks as u32),
                    ("ADAPTER_F32", adapter_f32),
                ];
                all.push((Kernel::Decode, [&base[..], &options[..]].concat()));
            }
        }
        for ranks in [16, 32, 64_u32] {
            for dropout in [0, 1] {
                for teams in Teams::all(ranks as usize) {
                    let masked = [("DROPOUT", dropout)];
                    let options =
                        [&base[..], &masked[..], &teams.defines(ranks as usize)[..]].concat();
                    all.push((Kernel::ShrinkRing, options));
                }
            }
            let most = sweep::most_pairs(ranks as usize) as u32;
            for (down, dropout, bits, next) in [
                (0, 0, 0, 0),
                (0, 1, 0, 0),
                (0, 2, 0, 0),
                (1, 0, 0, 0),
                (1, 0, 1, 0),
                (1, 1, 0, 0),
                (1, 0, 0, most),
                (1, 0, 1, most),
                (1, 1, 0, most),
            ] {
                for pairs in [1, most] {
                    let options = [("DROPOUT", dropout), ("RT", ranks), ("PAIRS", pairs)];
                    let products = [("DOWN", down), ("BITS", bits), ("NEXT", next)];
                    all.push((
                        Kernel::Sweep,
                        [&base[..], &options[..], &products[..]].concat(),
                    ));
                }
            }
        }
        // q is given or made, gradients are made beside or not, the last tiles by several clusters or not.
        for (backward, dropout, down, side, tail) in [
            (0, 0, 0, 0, 0),
            (0, 1, 0, 0, 0),
            (0, 0, 1, 0, 0),
            (0, 0, 2, 0, 0),
            (0, 0, 1, 0, 1),
            (0, 0, 2, 0, 1),
            (1, 0, 0, 0, 0),
            (1, 2, 0, 0, 0),
            (1, 0, 0, 1, 0),
            (1, 2, 0, 1, 0),
            (1, 0, 1, 1, 0),
            (1, 2, 1, 1, 0),
        ] {
            let steps: &[u32] = match (down, side) {
                (1, _) if dropout == 2 => &[1, 2],
                (0, 0) => &[1, 2, 3, 4],
                _ => &[1, 2, 4], // of ranks up to 64
            };
            for &steps in steps {
                let options = [
                    ("BACKWARD", backward),
                    ("DROPOUT", dropout),
                    ("RANK_STEPS", steps),
                    ("DOWN", down),
                    ("SIDE", side),
                    ("TAIL", tail),
                ];
                all.push((
                    Kernel::Gemm,
                    [&[("DTYPE", 1), ("ALIGNED", 1)][..], &options[..]].concat(),
                ));
                if steps == 1 {
                    all.push((Kernel::Gemm, [&f16[..2], &options[..]].concat()));
                }
            }
        }
    }
    all
}

/// Row tiles and warps that the launcher of `shrink` chooses from.
fn shrink_shapes(dtype: u32, rank_tile: u32) -> Vec<(u32, u32)> {
    match (dtype, rank_tile) {
        (0, 64) => vec![(1, 8)],
        (0, 32) => vec![(1, 8), (1, 16)],
        (_, 64) => vec![(1, 8), (2, 8), (4, 8)],
        _ => vec![(1, 8), (2, 8), (1, 16)],
    }
}
