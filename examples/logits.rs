//! Writes the logits of a text, to compare them with another program's.
//!
//! ```text
//! cargo run --release --example logits -- --model DIR --adapter lora-out --out logits.safetensors
//! python tests/python/check_adapter.py lora-out DIR --logits logits.safetensors
//! ```

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use candle_core::Tensor;
use clap::Parser;
use lora_core::LoraTargets;
use lora_examples::Result;
use lora_examples::cli;

/// Write `input_ids` [1, tokens] and `logits` [1, tokens, vocab] of a text as safetensors.
#[derive(Parser)]
struct Args {
    /// The text
    #[arg(default_value = "Definition: a small songbird with a red breast\nCategory:")]
    text: String,
    /// Model: a .gguf file or a Hugging Face folder [default: SmolLM2-135M-Instruct, fetched]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Folder of a saved adapter
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    cli::exit(run(Args::parse()))
}

fn run(args: Args) -> Result<ExitCode> {
    let dev = cli::device(&args.device)?;
    let pretrained = cli::open_model(args.model.as_deref())?;
    let mut model = pretrained.load(cli::base_dtype(&dev), &dev)?;
    if let Some(adapter) = &args.adapter {
        model.load_adapter(adapter)?;
    }
    let ids = pretrained.tokenizer.encode_start(&args.text)?;
    let ids = Tensor::new(ids.as_slice(), &dev)?;
    let hidden = model.hidden_states(&ids, &[ids.dim(0)?])?;
    let logits = model.logits(&hidden)?.to_dtype(DType::F32)?;
    let tensors = HashMap::from([
        ("input_ids", ids.unsqueeze(0)?),
        ("logits", logits.unsqueeze(0)?),
    ]);
    candle_core::safetensors::save(&tensors, &args.out)?;
    println!("{} tokens: {}", ids.dim(0)?, args.out.display());
    Ok(ExitCode::SUCCESS)
}
