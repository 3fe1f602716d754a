//! Results beside other streams and other processes, which take turns with this one on the card. Needs a device.

mod support;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, thread};

use cudarc::driver::{CudaContext, CudaStream};
use half::{bf16, f16};
use lora_kernels::{Dropout, Kernels, Place};

use support::{Case, Inputs, Real, device, end_within};

/// Set for the processes that the test starts.
const OTHER: &str = "LORA_KERNELS_OTHER_PROCESS";
const NAME: &str = "results_stay_the_same_beside_other_processes";
/// What such a process says when it keeps the card busy.
const BUSY: &str = "busy";

#[test]
fn results_stay_the_same_beside_other_processes() {
    let Some(context) = device() else { return };
    end_within(Duration::from_secs(600));
    if env::var_os(OTHER).is_some() {
        beside_streams(&context, |_, _| {
            io::stdout().write_all(format!("{BUSY}\n").as_bytes())?;
            io::stdin().read_to_end(&mut Vec::new())
        })
        .unwrap();
        return;
    }
    let others: Vec<Child> = (0..3).map(|_| another()).collect();
    let dropout = |place| Some(Dropout::new(place, 0.1, 7, 1, 2).unwrap());
    let few = |rank| Case::new(64, 4096, 512, rank);
    let post = Case {
        dropout: dropout(Place::Post),
        post: true,
        ..few(100)
    };
    let fills = Case {
        dropout: dropout(Place::Pre),
        ..Case::new(2048, 1000, 2048, 16)
    };
    // S in a pass, decoding, and the Hopper path with work beside it.
    let wrong = beside_streams(&context, |kernels, stream| {
        [
            other_results::<bf16>(kernels, stream, &post, 400),
            other_results::<f16>(kernels, stream, &post, 400),
            other_results::<bf16>(kernels, stream, &few(100), 400),
            other_results::<f16>(kernels, stream, &few(100), 400),
            other_results::<bf16>(kernels, stream, &few(16), 400),
            other_results::<bf16>(kernels, stream, &fills, 50),
        ]
    });
    for mut other in others {
        drop(other.stdin.take());
        assert!(other.wait().unwrap().success(), "in another process");
    }
    assert_eq!(wrong, [0; 6], "other results");
}

/// A process that keeps the card busy until its standard input ends, with this process at the latest.
fn another() -> Child {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(OTHER, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let is_busy = says.any(|line| line.unwrap().ends_with(BUSY));
    assert!(is_busy, "another process did not come to run kernels");
    child
}

/// Does `work` while other streams keep the card busy.
fn beside_streams<R>(
    context: &Arc<CudaContext>,
    work: impl FnOnce(&Kernels, &Arc<CudaStream>) -> R,
) -> R {
    let kernels = Kernels::new(context).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let kernels = Kernels::new(context).unwrap();
                let stream = context.new_stream().unwrap();
                let case = Case::new(1024, 1000, 1024, 16);
                let inputs = Inputs::<bf16, f32>::new(&case);
                let first = inputs.on_device(&kernels, &stream, &case);
                while !stop.load(Ordering::Relaxed) {
                    let mut last = inputs.runs_on_device(&kernels, &stream, &case, 50, 1);
                    assert!(
                        last.next().as_ref() == Some(&first),
                        "another result: {case:?}"
                    );
                }
            });
        }
        let result = work(&kernels, &context.per_thread_stream());
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// How many of so many results differ from the first.
fn other_results<T: Real>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    case: &Case,
    times: usize,
) -> usize {
    let inputs = Inputs::<T, f32>::new(case);
    let first = inputs.on_device(kernels, stream, case);
    let again = || inputs.on_device(kernels, stream, case);
    (0..times).filter(|_| again() != first).count()
}
