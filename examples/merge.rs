//! Writes a Hugging Face model folder with an adapter merged into its weights.
//!
//! ```text
//! cargo run --release --example merge -- --adapter lora-out --out merged
//! ```

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use candle_core::Device;
use clap::Parser;
use clap::ValueEnum;
use lora_core::LoraTargets;
use lora_examples::Result;
use lora_examples::cli;

/// Merge an adapter into its base model.
#[derive(Parser)]
struct Args {
    /// Model: a .gguf file or a Hugging Face folder [default: SmolLM2-135M-Instruct, fetched]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Folder of a saved adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the written weights
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
    F16,
}

fn main() -> ExitCode {
    cli::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<ExitCode> {
    let pretrained = cli::open_model(args.model.as_deref())?;
    let mut model = pretrained.load(DType::F32, &Device::Cpu)?;
    model.load_adapter(&args.adapter)?;
    let mut merged = BTreeMap::new();
    model.for_each_adapter(&mut |lora| {
        merged.insert(format!("{}.weight", lora.path()), lora.merged_weight()?);
        Ok(())
    })?;
    let dtype = match args.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    };
    pretrained.save_folder(&args.out, &merged, dtype)?;
    println!("Merged {} layers into {}", merged.len(), args.out.display());
    Ok(ExitCode::SUCCESS)
}
