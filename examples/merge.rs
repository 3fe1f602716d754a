//! Writes a Hugging Face model folder with an adapter merged into its weights.
//!
//! ```text
//! cargo run --release --example merge -- --adapter lora-out --out merged
//! ```

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use candle_core::Device;
use clap::Parser;
use clap::ValueEnum;
use lora_core::LoraTargets;
use lora_examples::Error;
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
    let merged = model.merged_tensors()?;
    let mut without_place = None;
    model.for_each_linear(&mut |path, linear| {
        let bias = format!("{path}.bias");
        if linear.bias().is_none() && merged.contains_key(&bias) {
            without_place = Some(bias);
        }
        Ok(())
    })?;
    if let Some(bias) = without_place {
        let adapter = args.adapter.display();
        return Err(Error::Usage(format!(
            "{adapter}: merging makes a `{bias}`, for which the format of the model has no place"
        )));
    }
    let dtype = match args.dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    };
    pretrained.save_folder(&args.out, &merged, dtype)?;
    println!(
        "Merged {} tensors into {}",
        merged.len(),
        args.out.display()
    );
    Ok(ExitCode::SUCCESS)
}
