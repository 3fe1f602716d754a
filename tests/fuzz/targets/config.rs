//! Any bytes as the configuration of a good file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    lora_fuzz::read(&[
        ("adapter_config.json", data),
        ("adapter_model.safetensors", lora_fuzz::WEIGHTS),
    ]);
});
