//! Results beside other processes, which take turns with this one on the card. Needs a device.

mod support;

use std::env;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::CudaStream;
use half::{bf16, f16};
use lora_kernels::{Dropout, Kernels, Place};

use support::{Case, Inputs, Real, device, end_within};

/// Set for the processes that the test starts.
const OTHER: &str = "LORA_KERNELS_OTHER_PROCESS";
const NAME: &str = "results_stay_the_same_beside_other_processes";

#[test]
fn results_stay_the_same_beside_other_processes() {
    let Some(context) = device() else { return };
    end_within(Duration::from_secs(600));
    let others: Vec<Child> = match env::var_os(OTHER) {
        Some(_) => Vec::new(),
        None => (0..3).map(|_| another()).collect(),
    };
    let kernels = Kernels::new(&context).unwrap();
    let stream = context.per_thread_stream();
    let dropout = Some(Dropout::new(Place::Pre, 0.1, 7, 1, 2).unwrap());
    let case = |dropout, rank| Case {
        dropout,
        ..Case::new(64, 4096, 512, rank)
    };
    // S in a pass, decoding, and the Hopper path with work beside it.
    repeat::<bf16>(&kernels, &stream, &case(None, 100), 300);
    repeat::<f16>(&kernels, &stream, &case(dropout, 100), 300);
    repeat::<bf16>(&kernels, &stream, &case(None, 16), 300);
    let fills = Case {
        dropout,
        ..Case::new(2048, 1000, 2048, 16)
    };
    repeat::<bf16>(&kernels, &stream, &fills, 60);
    for mut other in others {
        assert!(other.wait().unwrap().success(), "in another process");
    }
}

fn another() -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(OTHER, "1")
        .spawn()
        .unwrap()
}

fn repeat<T: Real>(kernels: &Kernels, stream: &Arc<CudaStream>, case: &Case, times: usize) {
    let inputs = Inputs::<T, f32>::new(case);
    let first = inputs.on_device(kernels, stream, case);
    for time in 0..times {
        let again = inputs.on_device(kernels, stream, case);
        assert!(again == first, "another result the {time}. time: {case:?}");
    }
}
