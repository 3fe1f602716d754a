//! CUDA against the CPU and against f64. Passes, saying so, where there is no card.
//!
//! `cargo test -p lora-tests --features cuda`

mod linear;
mod model;
mod shared;

use candle_core::Device;

/// The first card; without one, `None` and a line that says so.
fn card() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: no CUDA device ({error})");
            None
        }
    }
}
