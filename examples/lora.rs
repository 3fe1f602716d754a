//! Works on adapters for which their files are enough: inspect, convert, merge, diff, combine.
//!
//! ```text
//! cargo run --release --example lora -- inspect lora-out
//! ```

#![forbid(unsafe_code)]

use std::io;
use std::io::ErrorKind;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use lora_examples::Error;
use lora_examples::Result;
use lora_examples::adapter_cli::Command;
use lora_examples::cli;

/// Work on LoRA adapters without their model.
#[derive(Parser)]
#[command(name = "lora")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    cli::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<ExitCode> {
    let said = args.command.run()?;
    match io::stdout().write_all(said.as_bytes()) {
        // `lora inspect .. | head` has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        written => written
            .map(|()| ExitCode::SUCCESS)
            .map_err(Error::io(Path::new("standard output"))),
    }
}
