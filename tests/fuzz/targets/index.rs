//! Any bytes as the index of two files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    lora_fuzz::read(&[
        ("adapter_config.json", lora_fuzz::CONFIG),
        ("adapter_model.safetensors.index.json", data),
        ("one.safetensors", lora_fuzz::WEIGHTS),
        ("two.safetensors", lora_fuzz::WEIGHTS),
    ]);
});
