//! The memory of a device between the steps of a training run.

use candle_core::Device;

use crate::Result;

/// Lets the process keep up to `bytes` of a CUDA device's memory that it has freed, for its next
/// allocations. By the driver's default all of it goes back whenever the device is waited for, as at
/// the end of every training step that looks at its loss, and has to be mapped anew; with
/// `u64::MAX` a step took a fifth to a third less time on the card measured
/// (`lora-core/benches/RESULTS.md`). What is kept is not there for other processes.
///
/// Does nothing on other devices, which have no such rule.
///
/// ```
/// use candle_core::Device;
///
/// let device = Device::cuda_if_available(0)?;
/// lora_core::keep_freed_memory(&device, u64::MAX)?;
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// # Errors
/// If the device has no memory pool.
pub fn keep_freed_memory(device: &Device, bytes: u64) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let stream = device.cuda_stream();
        return lora_kernels::MemoryPool::of(stream.context())
            .and_then(|pool| pool.keep_freed(bytes))
            .map_err(|error| candle_core::Error::wrap(error).into());
    }
    let _ = (device, bytes);
    Ok(())
}
