//! Prints every model in this binary that can be adapted, and its linear layers.
//!
//! ```text
//! cargo run --example list_targets
//! ```

#![forbid(unsafe_code)]

// A model is listed if the binary links it; this one is in a library that nothing else here uses.
use lora_examples as _;

fn main() {
    for model in lora_core::registry() {
        println!("{}", model.name());
        for path in model.targets().paths() {
            println!("  {path}");
        }
    }
}
