//! Any bytes as a file of torch.save, or as the pickle in one.
#![no_main]

use lora_fuzz::archive::archive;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let wrapped;
    let file = if data.starts_with(b"PK") {
        data
    } else {
        let numbers = [0; 48];
        wrapped = archive(&[
            ("x/data.pkl", data),
            ("x/data/0", &numbers),
            ("x/data/1", &numbers[..32]),
        ]);
        &wrapped
    };
    lora_fuzz::read(&[
        ("adapter_config.json", lora_fuzz::CONFIG),
        ("adapter_model.bin", file),
    ]);
});
