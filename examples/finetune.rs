//! Fine-tunes a language model with LoRA: by default SmolLM2-135M-Instruct on WordNet categories.
//!
//! ```text
//! cargo run --release --example finetune
//! ```
//!
//! The folder `--out` then holds the adapter (`adapter_model.safetensors`,
//! `adapter_config.json`), `loss.svg`, `log.jsonl` and `trainer_state.safetensors`, with which
//! `--resume` goes on after Ctrl-C or a crash.

#![forbid(unsafe_code)]

use std::fs;
use std::fs::File;
use std::io::IsTerminal;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Parser;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use lora_core::LoraTargets;
use lora_examples::Error;
use lora_examples::Result;
use lora_examples::batch;
use lora_examples::batch::Example;
use lora_examples::cli;
use lora_examples::data;
use lora_examples::data::Row;
use lora_examples::evaluate;
use lora_examples::files;
use lora_examples::generate;
use lora_examples::model::CausalLm;
use lora_examples::plot;
use lora_examples::pretrained::Pretrained;
use lora_examples::settings::Options;
use lora_examples::settings::Settings;
use lora_examples::trainer::SavedRun;
use lora_examples::trainer::Step;
use lora_examples::trainer::Trainer;
use serde_json::Value;
use serde_json::json;

/// Fine-tune a language model with LoRA.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    options: Options,
    /// Folder for the adapter, the log, the loss curve and the state
    #[arg(long, value_name = "DIR", default_value = "lora-out")]
    out: PathBuf,
    /// Go on with the run in --out
    #[arg(long)]
    resume: bool,
    /// Steps between saved states
    #[arg(long, value_name = "STEPS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,
    /// Most held-out rows to measure the accuracy on
    #[arg(long, value_name = "ROWS", default_value_t = 200)]
    eval_rows: usize,
}

const SAMPLES: usize = 5;
const SAMPLE_TOKENS: usize = 8;

static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    cli::exit(run(Args::parse()))
}

fn run(args: Args) -> Result<ExitCode> {
    stop_on_ctrl_c()?;
    let out = &args.out;
    let saved = if args.resume {
        SavedRun::open(out)?
    } else {
        None
    };
    let settings = match &saved {
        Some(saved) => saved.settings().clone().resumed(&args.options)?,
        None => Settings::new(&args.options)?,
    };
    if args.resume && saved.is_none() {
        eprintln!("{} holds no saved run; starting one", out.display());
    }

    let dev = cli::device(&settings.device)?;
    let (train, test) = rows(&settings)?;
    let pretrained = cli::open_model(settings.model.as_deref())?;
    let fingerprint = data::fingerprint(&train);
    let (train, cut) = batch::examples(&train, &pretrained.tokenizer, settings.seq_len)?;
    if cut != batch::Truncated::default() {
        eprintln!(
            "--seq-len {}: {} rows cut, {} left out because nothing to learn was left",
            settings.seq_len, cut.cut, cut.dropped
        );
    }
    let test = &test[..test.len().min(args.eval_rows)];
    let test = match test {
        [] => Vec::new(),
        test => batch::examples(test, &pretrained.tokenizer, settings.seq_len)?.0,
    };
    let dtype = cli::dtype(settings.dtype.as_deref(), &dev)?;
    let model = pretrained.load(dtype, &dev)?;
    let (mut trainer, report) = Trainer::new(model, settings.clone(), fingerprint)?;
    println!("{}", summary(&report.to_string()));
    if let Some(saved) = &saved {
        trainer.resume(saved)?;
        println!(
            "Resuming after step {} of {}",
            trainer.steps_done(),
            settings.steps
        );
    } else {
        // From here on, the folder holds an adapter that loads and a run that can be resumed.
        trainer.save(out)?;
    }
    let mut log = Log::open(&out.join("log.jsonl"), trainer.steps_done())?;

    trainer.model.eval()?;
    trainer.model.disable_adapters()?;
    let before = measure(&trainer.model, &pretrained, &test, "before")?;
    trainer.model.enable_adapters()?;
    trainer.model.train()?;
    log.write(&json!({ "event": "before", "correct": before.correct, "rows": test.len() }))?;

    train_steps(
        &mut trainer,
        &settings,
        &train,
        &mut log,
        out,
        args.save_every,
    )?;
    trainer.save(out)?;
    let title = format!(
        "Loss, {} steps of {} rows",
        trainer.steps_done(),
        settings.batch
    );
    plot::loss_curve(&out.join("loss.svg"), &title, trainer.losses())?;
    if STOP.load(Ordering::Relaxed) {
        println!(
            "Stopped after step {} of {}; everything is saved. Go on with: --resume --out {}",
            trainer.steps_done(),
            settings.steps,
            out.display()
        );
        return Ok(ExitCode::from(130));
    }

    trainer.model.eval()?;
    let after = measure(&trainer.model, &pretrained, &test, "after")?;
    log.write(&json!({ "event": "after", "correct": after.correct, "rows": test.len() }))?;
    print_samples(&pretrained, &test, &before.samples, &after.samples)?;
    if !test.is_empty() {
        let percent = |correct: usize| 100. * correct as f64 / test.len() as f64;
        println!(
            "\nGreedy accuracy on {} held-out rows: {:.1} % before, {:.1} % after",
            test.len(),
            percent(before.correct),
            percent(after.correct)
        );
    }
    println!("Adapter, loss.svg and log.jsonl are in {}", out.display());
    Ok(ExitCode::SUCCESS)
}

fn stop_on_ctrl_c() -> Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nStopping after this step; press Ctrl-C again to quit at once");
    })
    .map_err(|e| Error::Usage(format!("cannot listen for Ctrl-C: {e}")))
}

/// Rows to train on and held-out rows.
fn rows(settings: &Settings) -> Result<(Vec<Row>, Vec<Row>)> {
    match (&settings.data, &settings.test) {
        (None, _) => Ok((data::wordnet_train()?, data::wordnet_test()?)),
        (Some(train), Some(test)) => Ok((data::read_rows(train)?, data::read_rows(test)?)),
        (Some(train), None) => Ok(data::hold_out(data::read_rows(train)?, settings.seed)),
    }
}

/// The last line of the table, which counts.
fn summary(report: &str) -> &str {
    report.lines().last().unwrap_or(report)
}

/// Accuracy and the first answers on held-out rows.
struct Measured {
    correct: usize,
    samples: Vec<String>,
}

fn measure(
    model: &CausalLm,
    pretrained: &Pretrained,
    test: &[Example],
    when: &str,
) -> Result<Measured> {
    let bar = ProgressBar::new(test.len() as u64)
        .with_style(style("{msg:>8} {wide_bar} {pos}/{len} rows"))
        .with_message(when.to_string());
    let correct = evaluate::exact_matches(model, test, |rows| bar.inc(rows as u64))?;
    bar.finish_and_clear();
    if !test.is_empty() {
        println!("Accuracy {when}: {correct} of {} held-out rows", test.len());
    }
    let ends = &pretrained.config.eos_token_ids;
    let answer = |row: &Example| {
        let ids = generate::greedy(model, row.prompt(), SAMPLE_TOKENS, ends, |_| {})?;
        pretrained.tokenizer.decode(&ids)
    };
    let samples = test
        .iter()
        .take(SAMPLES)
        .map(answer)
        .collect::<Result<_>>()?;
    Ok(Measured { correct, samples })
}

fn train_steps(
    trainer: &mut Trainer,
    settings: &Settings,
    rows: &[Example],
    log: &mut Log,
    out: &Path,
    save_every: u64,
) -> Result<()> {
    let first = trainer.steps_done();
    let bar = ProgressBar::new(settings.steps as u64)
        .with_style(style("{wide_bar} {pos}/{len}  {msg}  ETA {eta}"))
        .with_position(first as u64);
    bar.reset_eta();
    let start = Instant::now();
    let mut tokens = 0;
    while trainer.steps_done() < settings.steps && !STOP.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let step = trainer.step(rows)?;
        log.step(&step, begin.elapsed().as_secs_f64())?;
        tokens += step.tokens;
        let speed = tokens as f64 / start.elapsed().as_secs_f64();
        let line = format!("loss {:.3}  {speed:.0} tokens/s", step.loss);
        if !std::io::stderr().is_terminal() && (step.step % 10 == 0 || step.step == 1) {
            eprintln!("step {}/{}  {line}", step.step, settings.steps);
        }
        bar.set_message(line);
        bar.inc(1);
        if (step.step as u64).is_multiple_of(save_every) && step.step < settings.steps {
            trainer.save(out)?;
        }
    }
    bar.finish_and_clear();
    if trainer.steps_done() > first {
        println!(
            "Trained {} steps, {tokens} tokens, in {:.0} s: {:.0} tokens/s",
            trainer.steps_done() - first,
            start.elapsed().as_secs_f64(),
            tokens as f64 / start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn print_samples(
    pretrained: &Pretrained,
    test: &[Example],
    before: &[String],
    after: &[String],
) -> Result<()> {
    for ((row, before), after) in test.iter().zip(before).zip(after) {
        println!("\n{}", pretrained.tokenizer.decode(row.prompt())?);
        println!(
            "  expected  {:?}",
            pretrained.tokenizer.decode(&row.ids[row.answer.clone()])?
        );
        println!("  before    {before:?}");
        println!("  after     {after:?}");
    }
    Ok(())
}

/// One JSON object a line.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Starts a log, or goes on with one: lines of steps after `done` were never saved and go.
    fn open(path: &Path, done: usize) -> Result<Self> {
        let old = if done == 0 {
            String::new()
        } else {
            fs::read_to_string(path).unwrap_or_default()
        };
        let keep = old.lines().filter(|line| {
            let line = serde_json::from_str::<Value>(line).unwrap_or(Value::Null);
            line["step"]
                .as_u64()
                .is_some_and(|step| step <= done as u64)
        });
        let kept: String = keep.flat_map(|line| [line, "\n"]).collect();
        files::write_bytes(path, kept.as_bytes())?;
        let file = File::options()
            .append(true)
            .open(path)
            .map_err(Error::io(path))?;
        Ok(Self {
            path: path.into(),
            file,
        })
    }

    fn step(&mut self, step: &Step, seconds: f64) -> Result<()> {
        let mut line = json!(step);
        line["seconds"] = json!(seconds);
        self.write(&line)
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}").map_err(Error::io(&self.path))
    }
}
