//! The kernels against f64 over a grid of shapes, dtypes, layouts and dropout. Needs a device.

mod support;

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::{bf16, f16};
use lora_kernels::{Dropout, Kernels, Place, Preference};

use support::{Case, Real, check, device};

fn with_device(test: impl Fn(&Kernels, &Arc<CudaStream>)) {
    if let Some(context) = device() {
        test(
            &Kernels::new(&context).unwrap(),
            &context.per_thread_stream(),
        );
    }
}

fn every_dtype(kernels: &Kernels, stream: &Arc<CudaStream>, case: &Case) {
    fn both<T: Real>(kernels: &Kernels, stream: &Arc<CudaStream>, case: &Case) {
        check::<T, f32>(kernels, stream, case);
        check::<T, T>(kernels, stream, case);
    }
    check::<f32, f32>(kernels, stream, case);
    both::<bf16>(kernels, stream, case);
    both::<f16>(kernels, stream, case);
}

#[test]
fn forward_and_gradients_match_f64() {
    with_device(|kernels, stream| {
        for tokens in [1, 7, 128, 300] {
            for (in_features, out_features) in [(8, 8), (64, 1000), (1000, 64), (256, 384)] {
                for rank in [1, 8, 16] {
                    every_dtype(
                        kernels,
                        stream,
                        &Case::new(tokens, in_features, out_features, rank),
                    );
                }
            }
        }
    });
}

#[test]
fn every_rank_matches_f64() {
    with_device(|kernels, stream| {
        for rank in [1, 4, 8, 16, 24, 40, 64, 100, 128, 256] {
            let case = Case {
                bias: true,
                ..Case::new(129, 264, 520, rank)
            };
            every_dtype(kernels, stream, &case);
        }
    });
}

#[test]
fn large_layers_match_f64() {
    with_device(|kernels, stream| {
        check::<bf16, f32>(kernels, stream, &Case::new(8192, 4096, 4096, 16));
        check::<bf16, f32>(
            kernels,
            stream,
            &Case {
                gap: 8,
                ..Case::new(2048, 4096, 4104, 24)
            },
        );
        check::<bf16, f32>(kernels, stream, &Case::new(2049, 4096, 14336, 16));
        check::<f16, f32>(kernels, stream, &Case::new(2049, 14336, 4096, 64));
        check::<f32, f32>(kernels, stream, &Case::new(2049, 4096, 4096, 16));
        check::<f32, f32>(kernels, stream, &Case::new(64, 14336, 1000, 8));
        // Blocks that go through many columns of few rows.
        check::<bf16, f32>(kernels, stream, &Case::new(100, 64, 28_672, 16));
    });
}

#[test]
fn large_masked_layers_match_f64() {
    with_device(|kernels, stream| {
        // Some rows of S by a pass, the others, unit after unit, by the clusters without tiles.
        for (tokens, in_features, out_features, rank) in [
            (8192, 4096, 4096, 16),
            (8192, 1024, 1024, 16), // fewer boxes than a ring has stages
            (8192, 512, 2048, 24),
            (5000, 1096, 2056, 9),
        ] {
            let case = Case {
                dropout: Some(Dropout::new(Place::Pre, 0.3, 42, 17, 5).unwrap()),
                ..Case::new(tokens, in_features, out_features, rank)
            };
            check::<bf16, f32>(kernels, stream, &case);
        }
    });
}

#[test]
fn gradients_of_one_pass_match_f64() {
    with_device(|kernels, stream| {
        // Some columns of the gradient of A by the pass that makes dS, the others by the clusters without tiles: those of
        // a cluster by half of the rows each, or by all rows of as many.
        for (tokens, in_features, out_features, rank) in [
            (8192, 2048, 2048, 16),
            (8100, 2056, 2048, 16),
            (8192, 4096, 4096, 64),
        ] {
            for p in [0.0, 0.3] {
                let case = Case {
                    dropout: Some(Dropout::new(Place::Pre, p, 42, 17, 5).unwrap()),
                    ..Case::new(tokens, in_features, out_features, rank)
                };
                check::<bf16, f32>(kernels, stream, &case);
            }
        }
    });
}

#[test]
fn few_tokens_match_f64() {
    with_device(|kernels, stream| {
        for tokens in [1, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128] {
            // The last in several waves of blocks.
            for (in_features, out_features) in [(1032, 520), (4096, 100), (64, 4096), (264, 9001)] {
                for rank in [3, 16, 24, 64, 100] {
                    let case = Case {
                        bias: rank == 24,
                        gap: if tokens == 33 { 8 } else { 0 },
                        ..Case::new(tokens, in_features, out_features, rank)
                    };
                    check::<bf16, f32>(kernels, stream, &case);
                    check::<f16, f16>(kernels, stream, &case);
                }
            }
        }
    });
}

#[test]
fn many_tokens_match_f64() {
    with_device(|kernels, stream| {
        // Blocks take more rows where there are more; the wider inputs go round their rings.
        for tokens in [3_900, 7_700] {
            for (rank, in_features) in [(3, 1608), (24, 200), (64, 1608), (100, 200)] {
                for dropout in [
                    None,
                    Some(Dropout::new(Place::Pre, 0.3, 42, 17, 1 << 33 | 5).unwrap()),
                ] {
                    let case = Case {
                        dropout,
                        gap: 8,
                        ..Case::new(tokens, in_features, 72, rank)
                    };
                    check::<bf16, f32>(kernels, stream, &case);
                    check::<f16, f16>(kernels, stream, &case);
                }
            }
        }
    });
}

#[test]
fn odd_widths_offsets_and_gaps_match_f64() {
    with_device(|kernels, stream| {
        for (in_features, out_features) in [(63, 65), (1, 17), (100, 36), (129, 1)] {
            for (offset, gap) in [(0, 0), (1, 3), (8, 8), (3, 0)] {
                let case = Case {
                    offset,
                    gap,
                    bias: true,
                    ..Case::new(77, in_features, out_features, 5)
                };
                every_dtype(kernels, stream, &case);
            }
        }
        for (offset, gap) in [(8, 8), (8, 64), (1, 7), (4, 4)] {
            every_dtype(
                kernels,
                stream,
                &Case {
                    offset,
                    gap,
                    bias: true,
                    ..Case::new(300, 512, 256, 16)
                },
            );
        }
    });
}

#[test]
fn dropout_draws_the_mask_of_the_reference() {
    with_device(|kernels, stream| {
        for (place, post) in [(Place::Pre, false), (Place::Post, true)] {
            for p in [0.1, 0.5] {
                let dropout =
                    Some(Dropout::new(place, p, 0x1234_5678_9abc_def0, 17, 1 << 33 | 5).unwrap());
                for (tokens, in_features, out_features, rank, gap) in [
                    (130, 256, 512, 16, 0),
                    (7, 63, 65, 8, 2),
                    (300, 1000, 264, 24, 8),
                    (64, 4096, 512, 100, 0),
                    (2049, 1024, 1536, 16, 0),
                ] {
                    let case = Case {
                        dropout,
                        post,
                        gap,
                        bias: true,
                        ..Case::new(tokens, in_features, out_features, rank)
                    };
                    every_dtype(kernels, stream, &case);
                }
            }
        }
    });
}

#[test]
fn dropout_of_zero_changes_no_bit() {
    with_device(|kernels, stream| {
        let plain = Case::new(129, 256, 384, 16);
        let zero = Case {
            dropout: Some(Dropout::new(Place::Pre, 0.0, 1, 2, 3).unwrap()),
            ..plain.clone()
        };
        let inputs = support::Inputs::<bf16, f32>::new(&plain);
        assert!(
            inputs.on_device(kernels, stream, &plain) == inputs.on_device(kernels, stream, &zero)
        );
    });
}

#[test]
fn an_empty_batch_gives_empty_outputs_and_zero_gradients() {
    with_device(|kernels, stream| {
        every_dtype(
            kernels,
            stream,
            &Case {
                bias: true,
                ..Case::new(0, 64, 96, 8)
            },
        );
    });
}

#[test]
fn the_hopper_path_matches_f64_wherever_it_can_run() {
    let Some(context) = device() else { return };
    let (kernels, stream) = (
        Kernels::new(&context).unwrap().prefer(Preference::Hopper),
        context.per_thread_stream(),
    );
    for (tokens, in_features, out_features, rank) in [
        (256, 256, 256, 16),
        (512, 512, 512, 1),
        (1, 64, 64, 8),
        (7, 8, 8, 4),
        (300, 1000, 264, 24),
        (129, 264, 1000, 64),
        (2049, 520, 648, 40),
        (333, 128, 4096, 16),
        (100, 4096, 512, 16),
        (1000, 14336, 512, 16),
        (300, 512, 768, 128),
        (300, 768, 512, 256),
        (2048, 2048, 4608, 16), // some gradients by one block, the others by all that are done
        (17_001, 264, 264, 16), // more rows of tiles than the card has clusters
        // Tiles left after whole waves of 66 clusters, each by four of them, or two.
        (2304, 2048, 2048, 16),
        (2304, 520, 2560, 40),
    ] {
        let case = Case {
            bias: true,
            ..Case::new(tokens, in_features, out_features, rank)
        };
        check::<bf16, f32>(&kernels, &stream, &case);
        check::<f16, f16>(
            &kernels,
            &stream,
            &Case {
                bias: false,
                gap: 8,
                offset: 16,
                ..case.clone()
            },
        );
        for (place, post) in [(Place::Pre, false), (Place::Post, true)] {
            let dropout =
                Some(Dropout::new(place, 0.3, 0x1234_5678_9abc_def0, 17, 1 << 33 | 5).unwrap());
            check::<bf16, f32>(
                &kernels,
                &stream,
                &Case {
                    dropout,
                    post,
                    ..case.clone()
                },
            );
            check::<f16, f32>(
                &kernels,
                &stream,
                &Case {
                    dropout,
                    post,
                    gap: 8,
                    ..case.clone()
                },
            );
        }
    }
}
