//! Any bytes as all files of a folder. The first byte says which files there are, the next two how
//! long the configuration is.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let &[kind, low, high, ref rest @ ..] = data else {
        return;
    };
    let len = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (config, weights) = rest.split_at(len);
    let holder = match kind % 3 {
        0 => "adapter_model.safetensors",
        1 => "adapter_model.bin",
        _ => "adapter_model.safetensors.index.json",
    };
    let mut files = vec![("adapter_config.json", config), (holder, weights)];
    if kind & 0x80 != 0 {
        files.push(("automodel_peft_config.json", config));
    }
    lora_fuzz::read(&files);
});
