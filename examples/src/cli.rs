//! What the programs do alike: devices, models, errors.

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use candle_core::Device;

use crate::Error;
use crate::Result;
use lora_core::keep_freed_memory;

use crate::fetch;
use crate::pretrained::Pretrained;

/// Parses `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If it is none of these, or the device is not there.
pub fn device(name: &str) -> Result<Device> {
    let number = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
    };
    let number = number
        .ok_or_else(|| Error::Usage(format!("--device {name} is not cpu, cuda or cuda:N")))?;
    let device = Device::new_cuda(number).map_err(|e| {
        Error::Usage(format!(
            "--device {name}: {e}; build with `--features cuda`"
        ))
    })?;
    keep_freed_memory(&device, u64::MAX)?;
    Ok(device)
}

/// The type that base weights have on a device: f32 on the CPU, bf16 elsewhere.
pub fn base_dtype(dev: &Device) -> DType {
    if dev.is_cpu() {
        DType::F32
    } else {
        DType::BF16
    }
}

/// The type called `name`, or what suits the device.
///
/// # Errors
/// If there is no such type.
pub fn dtype(name: Option<&str>, dev: &Device) -> Result<DType> {
    match name {
        None => Ok(base_dtype(dev)),
        Some("f32") => Ok(DType::F32),
        Some("bf16") => Ok(DType::BF16),
        Some(name) => Err(Error::Usage(format!("--dtype {name} is not f32 or bf16"))),
    }
}

/// Opens a model, or the default one, which is fetched first if need be.
pub fn open_model(path: Option<&Path>) -> Result<Pretrained> {
    let path = path.map_or_else(fetch::default_model, |path| Ok(PathBuf::from(path)))?;
    Pretrained::open(&path)
}

/// `text` without control characters, but for the ends of lines: names in files would command the
/// terminal by them. They are shown as JSON escapes them.
///
/// ```
/// assert_eq!(lora_examples::cli::printable("a\x1b[2J\nb"), "a\\u001b[2J\nb");
/// ```
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            shown += &format!("\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Prints an error and turns it into an exit code: 2 for wrong usage, 3 if the default model
/// cannot be fetched, 1 for the rest.
pub fn exit(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", printable(&error.to_string()));
        ExitCode::from(match error {
            Error::Usage(_) => 2,
            Error::Fetch { .. } => 3,
            _ => 1,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_what_is_named_or_suits_the_device() {
        let on_cpu = |name| dtype(name, &Device::Cpu);
        assert_eq!(on_cpu(None).unwrap(), DType::F32);
        assert_eq!(on_cpu(Some("f32")).unwrap(), DType::F32);
        assert_eq!(on_cpu(Some("bf16")).unwrap(), DType::BF16);
        let error = on_cpu(Some("f16")).unwrap_err().to_string();
        assert!(error.contains("--dtype f16"), "{error}");
    }
}
