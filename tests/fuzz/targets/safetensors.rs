//! Any bytes as the file of tensors.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    lora_fuzz::read(&[
        ("adapter_config.json", lora_fuzz::CONFIG),
        ("adapter_model.safetensors", data),
    ]);
});
