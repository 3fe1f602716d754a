//! Runs a model with adapters on token ids and writes what comes out, to compare it with another
//! program's; trains and saves adapters for the other program to load.
//!
//! ```text
//! forward --model DIR --inputs ids.safetensors --adapter lora-out --out out.safetensors
//! forward .. --adapter legal=a --adapter french=b --rows legal,__base__,french
//! forward .. --train config.json --save lora-out
//! ```
//!
//! `tests/python/live_check.py` compares it with PEFT in both directions.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::DType;
use candle_core::Tensor;
use candle_nn::AdamW;
use candle_nn::Optimizer;
use clap::Parser;
use lora_core::LoraTargets;
use lora_core::PeftConfig;
use lora_examples::Error;
use lora_examples::Result;
use lora_examples::any_model::AnyModel;
use lora_examples::cli;
use lora_examples::files;

/// Write `output` of a model's forward pass on `input_ids` [batch, tokens] as safetensors: logits
/// of a decoder, hidden states of an encoder, scores of a classifier.
#[derive(Parser)]
struct Args {
    /// A Hugging Face folder: the Llama family or BERT
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A safetensors file with `input_ids`, and `attention_mask` where there is padding
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// Folder of a saved adapter; of several the sum acts
    #[arg(long, value_name = "[NAME=]DIR")]
    adapter: Vec<String>,
    /// A PeftConfig as JSON: a new adapter, trained for a few steps
    #[arg(long, value_name = "[NAME=]FILE")]
    train: Vec<String>,
    /// The adapter of every row of the batch, `__base__` for none
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    rows: Vec<String>,
    /// Where to save the adapter; several, each in a folder of its name
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

const STEPS: usize = 3;
const LEARNING_RATE: f64 = 0.05;

fn main() -> ExitCode {
    cli::exit(run(Args::parse()))
}

fn run(args: Args) -> Result<ExitCode> {
    let dev = cli::device(&args.device)?;
    let inputs = candle_core::safetensors::load(&args.inputs, &dev)?;
    let ids = inputs
        .get("input_ids")
        .ok_or_else(|| Error::model(&args.inputs, "holds no `input_ids`"))?;
    let mask = inputs.get("attention_mask");
    let mut model = AnyModel::open(&args.model, DType::F32, &dev)?;

    let mut names = Vec::new();
    for (name, dir) in args.adapter.iter().map(named) {
        model.load_adapter_as(name, dir)?;
        names.push(name);
    }
    for (name, file) in args.train.iter().map(named) {
        model.add_adapter(name, &read_config(Path::new(file))?)?;
        model.set_adapter(name)?;
        train(&mut model, ids, mask)?;
        names.push(name);
    }
    model.set_adapters(&names)?;
    model.eval()?;
    let output = if args.rows.is_empty() {
        model.forward(ids, mask)?
    } else {
        let rows: Vec<_> = args
            .rows
            .iter()
            .map(|name| (name != "__base__").then_some(name))
            .collect();
        let selection = model.adapters()?.rows(&rows)?;
        selection.scope(|| model.forward(ids, mask))?
    };

    if let Some(dir) = &args.save {
        match names[..] {
            [name] => model.save_adapter_as(name, dir)?,
            _ => names
                .iter()
                .try_for_each(|name| model.save_adapter_as(name, dir.join(name)))?,
        }
    }
    println!("{:?}: {}", output.dims(), args.out.display());
    candle_core::safetensors::save(&HashMap::from([("output", output)]), &args.out)?;
    Ok(ExitCode::SUCCESS)
}

/// `NAME=PATH`, or a path of the adapter `default`.
fn named(argument: &str) -> (&str, &str) {
    argument.split_once('=').unwrap_or(("default", argument))
}

fn read_config(path: &Path) -> Result<PeftConfig> {
    let json = files::read_json(path)?.ok_or_else(|| Error::model(path, "no such file"))?;
    Ok(PeftConfig::from_dict(&json)?)
}

/// Makes the output smaller: any loss would do to move what is trained.
fn train(model: &mut AnyModel, ids: &Tensor, mask: Option<&Tensor>) -> Result<()> {
    let mut optimizer = AdamW::new_lr(model.lora_vars()?, LEARNING_RATE)?;
    for _ in 0..STEPS {
        let loss = model.forward(ids, mask)?.sqr()?.mean_all()?;
        optimizer.backward_step(&loss)?;
    }
    Ok(())
}
