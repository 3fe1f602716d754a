//! The ops and layers of `lora_core::nn`: values and gradients.

mod attention;
mod cross_entropy;
mod embedding;
mod norm;
mod oracle;
mod rope;
mod softmax;
mod stock;
mod swiglu;
