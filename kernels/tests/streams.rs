//! Kernels whose blocks wait for each other, beside others of other streams. Needs a device.

mod support;

use std::time::Duration;
use std::{iter, thread};

use half::bf16;
use lora_kernels::{Dropout, Kernels, Place, Preference};

use support::{Case, Inputs, device, end_within};

#[test]
fn streams_end_beside_each_other_and_give_what_each_gives_alone() {
    let Some(context) = device() else { return };
    end_within(Duration::from_secs(300));
    let kernels = Kernels::new(&context).unwrap().prefer(Preference::Hopper);
    // Alone at first: its kernels are launched like any others until the other streams come.
    let first = context.new_stream().unwrap();
    let undropped = Case::new(2048, 1000, 2048, 16); // fills a card
    let dropout = Some(Dropout::new(Place::Pre, 0.1, 7, 1, 2).unwrap());
    for case in [
        undropped.clone(),
        Case {
            dropout,
            ..undropped
        },
    ] {
        let inputs = Inputs::<bf16, f32>::new(&case);
        let alone = inputs.on_device(&kernels, &first, &case);
        thread::scope(|scope| {
            let others = (0..5).map(|_| context.new_stream().unwrap());
            for stream in iter::once(first.clone()).chain(others) {
                let (inputs, kernels, case, alone) = (&inputs, &kernels, &case, &alone);
                scope.spawn(move || {
                    let last = inputs.last_on_device(kernels, &stream, case, 300);
                    assert!(
                        last == *alone,
                        "another result beside other streams: {case:?}"
                    );
                });
            }
        });
    }
}
