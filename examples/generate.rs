//! Answers prompts with a model, with or without an adapter.
//!
//! ```text
//! cargo run --release --example generate -- --adapter lora-out \
//!     $'Definition: a small songbird with a red breast\nCategory:'
//! ```

#![forbid(unsafe_code)]

use std::io;
use std::io::BufRead;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lora_core::LoraTargets;
use lora_examples::Error;
use lora_examples::Result;
use lora_examples::cli;
use lora_examples::generate;
use lora_examples::tokenizer::Message;

/// Answer prompts, from the arguments or a line each from the standard input.
#[derive(Parser)]
struct Args {
    /// Prompts
    prompts: Vec<String>,
    /// Model: a .gguf file or a Hugging Face folder [default: SmolLM2-135M-Instruct, fetched]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Folder of a saved adapter
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Treat each prompt as a user's message in a chat
    #[arg(long)]
    chat: bool,
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    max_tokens: usize,
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
    let tokenizer = &pretrained.tokenizer;
    let answer = |prompt: &str| -> Result<()> {
        let ids = if args.chat {
            let message = Message {
                role: "user".into(),
                content: prompt.into(),
            };
            tokenizer.encode(&tokenizer.render_chat(&[message], true)?)?
        } else {
            tokenizer.encode_start(prompt)?
        };
        let stdout = Error::io("standard output".as_ref());
        let mut out = io::stdout().lock();
        let mut made = Vec::new();
        let mut shown = 0;
        let ends = &pretrained.config.eos_token_ids;
        generate::greedy(&model, &ids, args.max_tokens, ends, |token| {
            made.push(token);
            // A character may take several tokens; show it when it is whole.
            let text = tokenizer.decode(&made).unwrap_or_default();
            if !text.ends_with('\u{fffd}') && text.is_char_boundary(shown) {
                write!(out, "{}", &text[shown..])
                    .and_then(|()| out.flush())
                    .ok();
                shown = text.len();
            }
        })?;
        writeln!(out).map_err(stdout)
    };
    if args.prompts.is_empty() {
        for line in io::stdin().lock().lines() {
            answer(&line.map_err(Error::io("standard input".as_ref()))?)?;
        }
    }
    args.prompts.iter().try_for_each(|prompt| answer(prompt))?;
    Ok(ExitCode::SUCCESS)
}
