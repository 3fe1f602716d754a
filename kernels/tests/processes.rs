//! Results beside other streams and other processes, which take turns with this one on the card. Needs a device.

mod support;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, thread};

use cudarc::driver::{CudaContext, CudaStream};
use half::{bf16, f16};
use lora_kernels::{Dropout, Kernels, Place, Preference};

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
        beside_streams(&context, || {
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
    let kernels = Kernels::new(&context).unwrap();
    let hopper = Kernels::new(&context).unwrap().prefer(Preference::Hopper);
    let stream = context.per_thread_stream();
    // S in a pass, decoding, and the Hopper path with work beside it.
    let wrong = beside_streams(&context, || {
        [
            other_results::<bf16>(&kernels, &stream, &post, 400),
            other_results::<f16>(&kernels, &stream, &post, 400),
            other_results::<bf16>(&kernels, &stream, &few(100), 400),
            other_results::<f16>(&kernels, &stream, &few(100), 400),
            other_results::<bf16>(&kernels, &stream, &few(16), 400),
            other_results::<bf16>(&hopper, &stream, &fills, 50),
        ]
    });
    let ended = others.into_iter().map(|mut other| {
        drop(other.stdin.take());
        other.wait().unwrap()
    });
    let ended: Vec<ExitStatus> = ended.collect();
    assert_eq!(wrong, [0; 6], "other results");
    assert!(
        ended.iter().all(ExitStatus::success),
        "in other processes: {ended:?}"
    );
}

/// A process that keeps the card busy until its standard input ends, with this process at the latest.
fn another() -> Child {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"]) // what it has to say goes to the standard error
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

/// Tells other threads to end when it is dropped, by a panic too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does `work` while four streams keep the card busy.
fn beside_streams<R>(context: &Arc<CudaContext>, work: impl FnOnce() -> R) -> R {
    let stop = AtomicBool::new(false);
    let (ready, all_ready) = mpsc::channel();
    thread::scope(|scope| {
        let guard = Stop(&stop);
        for _ in 0..4 {
            let (ready, stop) = (ready.clone(), &stop);
            scope.spawn(move || {
                let kernels = Kernels::new(context).unwrap();
                let stream = context.new_stream().unwrap();
                let case = Case::new(1024, 1000, 1024, 16);
                let inputs = Inputs::<bf16, f32>::new(&case);
                let first = inputs.on_device(&kernels, &stream, &case);
                ready.send(()).unwrap();
                drop(ready); // what waits learns of one that fails before
                while !stop.load(Ordering::Relaxed) {
                    let last = inputs.last_on_device(&kernels, &stream, &case, 50);
                    assert!(last == first, "another result: {case:?}");
                }
            });
        }
        drop(ready);
        for _ in 0..4 {
            all_ready.recv().expect("a stream runs kernels");
        }
        let result = work();
        drop(guard);
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
