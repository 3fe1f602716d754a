//! lora-derive
