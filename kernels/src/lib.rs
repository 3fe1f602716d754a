//! CUDA kernels for LoRA linears, compiled at run time for the card found.

mod check;
mod cubin;
mod dropout;
mod element;
mod error;
mod gemm;
mod hopper;
mod kernels;
mod linear;
mod path;
mod skinny;

pub use check::compile_all;
pub use dropout::{Dropout, Place};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use gemm::F32Math;
pub use kernels::{Kernels, first_device};
pub use linear::{Forward, Gradients, InputGradient, LoraLinear, Saved};
pub use path::{Path, Preference, Reason};
pub use skinny::Rows;
