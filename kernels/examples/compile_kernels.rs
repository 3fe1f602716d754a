//! Compiles every kernel for the architectures named on the command line; needs NVRTC and no device.
//!
//! `cargo run --release -p lora-kernels --example compile_kernels -- sm_80 sm_90a`

use std::time::Instant;

use lora_kernels::compile_all;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for arch in std::env::args().skip(1) {
        let start = Instant::now();
        let count = compile_all(&arch)?;
        println!(
            "{arch}: {count} kernels in {:.0} s",
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
