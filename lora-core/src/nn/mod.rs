//! Layers and functions with the names and signatures of `candle_nn` that can be trained.

mod linear;

pub use linear::{Linear, linear, linear_b, linear_no_bias};
