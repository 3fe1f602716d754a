//! What the `lora` program does: work on adapters for which their files are enough.

use std::fmt::Write;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use clap::Subcommand;
use clap::ValueEnum;
use lora_core::MergedAdapters;
use lora_core::adapter::AdapterWeights;
use lora_core::adapter::Combination;
use lora_core::adapter::Combined;
use lora_core::adapter::Difference;
use lora_core::adapter::Election;
use lora_core::adapter::Inspection;
use lora_core::adapter::Method;
use lora_core::adapter::Profile;

use crate::Error;
use crate::Result;
use crate::cli::printable;
use crate::merge_folder::check_empty;
use crate::merge_folder::merge_folder;

/// One thing to do. An adapter is given as its folder, or as the file of its weights.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print what is in an adapter: layers, ranks, scalings, norms
    Inspect(Inspect),
    /// Write an adapter anew, in PEFT's form or in one that every reader takes alike
    Convert(Convert),
    /// Copy a base model's folder with adapters merged into its weights
    Merge(Merge),
    /// Compare what two adapters add to each layer's weight
    Diff(Diff),
    /// Make one adapter of several
    Combine(Combine),
}

/// `lora inspect`
#[derive(Args, Debug)]
pub struct Inspect {
    /// The adapter; a folder may hold several by name
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `lora convert`
#[derive(Args, Debug)]
pub struct Convert {
    /// The adapter: PEFT's safetensors or .bin, or NeMo AutoModel's
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// peft keeps each layer's rank and alpha; universal has one of each, as vLLM and llama.cpp
    /// need it
    #[arg(long, value_name = "PROFILE", default_value_t = Profile::Universal)]
    pub profile: Profile,
}

/// `lora merge`
#[derive(Args, Debug)]
pub struct Merge {
    /// Folder of the base model, with safetensors files
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Put TO in place of FROM where the adapters' paths begin with it; either may be empty
    #[arg(long, value_name = "FROM=TO")]
    pub replace_prefix: Option<String>,
    /// Take adapters that were trained on another base than this one, or on different ones
    #[arg(long)]
    pub any_base: bool,
    /// The adapters, which are added up
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]")]
    pub adapters: Vec<Weighted>,
}

/// `lora diff`
#[derive(Args, Debug)]
pub struct Diff {
    /// The first adapter
    #[arg(value_name = "ADAPTER")]
    pub first: PathBuf,
    /// The second adapter
    #[arg(value_name = "ADAPTER")]
    pub second: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `lora combine`
#[derive(Args, Debug)]
pub struct Combine {
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// linear, cat, svd, magnitude_prune, ties, dare_linear or dare_ties
    #[arg(long, value_name = "METHOD", default_value_t = Method::Linear)]
    pub method: Method,
    /// Largest rank of a layer [default: what the method needs]
    #[arg(long, value_name = "RANK")]
    pub rank: Option<usize>,
    /// Share of elements that magnitude_prune, ties and dare keep
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub density: f64,
    /// How ties and dare_ties elect signs
    #[arg(long, value_enum, default_value_t = Signs::Total)]
    pub election: Signs,
    /// Seed of the elements that dare drops
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Take adapters that were trained on different bases
    #[arg(long)]
    pub any_base: bool,
    /// peft or universal
    #[arg(long, value_name = "PROFILE", default_value_t = Profile::Peft)]
    pub profile: Profile,
    /// The adapters and what each counts
    #[arg(required = true, value_name = "ADAPTER[=WEIGHT]")]
    pub adapters: Vec<Weighted>,
}

/// An adapter and what it counts: 1 if nothing is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// Its folder or file.
    pub adapter: PathBuf,
    /// The factor of what it adds to a weight.
    pub weight: f64,
}

/// [`Election`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Signs {
    /// By the sign of the sum
    Total,
    /// By the majority
    Frequency,
}

impl Command {
    /// Does it, and says what came out.
    ///
    /// # Errors
    /// If a file can't be read or written, or something does not fit; nothing is written then.
    pub fn run(&self) -> Result<String> {
        let said = match self {
            Self::Inspect(inspect) => inspect.run(),
            Self::Convert(convert) => convert.run(),
            Self::Merge(merge) => merge.run(),
            Self::Diff(diff) => diff.run(),
            Self::Combine(combine) => combine.run(),
        };
        Ok(printable(&said?))
    }
}

impl Inspect {
    fn run(&self) -> Result<String> {
        let adapters = if self.adapter.is_dir() {
            AdapterWeights::read_named(&self.adapter)?
        } else {
            [("default".to_string(), AdapterWeights::read(&self.adapter)?)].into()
        };
        let inspections = adapters
            .iter()
            .map(|(name, adapter)| Ok((name, Inspection::of(adapter)?)))
            .collect::<Result<Vec<_>>>()?;
        if self.json {
            return json(
                &inspections
                    .into_iter()
                    .collect::<std::collections::BTreeMap<_, _>>(),
            );
        }
        let tables = inspections.iter().map(|(name, inspection)| {
            if inspections.len() == 1 {
                format!("{inspection}\n")
            } else {
                format!("adapter `{name}`\n{inspection}\n")
            }
        });
        Ok(tables.collect::<Vec<_>>().join("\n"))
    }
}

impl Convert {
    fn run(&self) -> Result<String> {
        check_empty(&self.out)?;
        let adapter = AdapterWeights::read(&self.adapter)?;
        adapter.write(&self.out, self.profile)?;
        let mut said = notes([&adapter]);
        said += &format!(
            "Wrote {} layers to {} in the {} form\n",
            adapter.layers.len(),
            self.out.display(),
            self.profile
        );
        Ok(said)
    }
}

impl Merge {
    fn run(&self) -> Result<String> {
        check_empty(&self.out)?;
        let adapters = read(&self.adapters, self.any_base)?;
        let mut said = notes(adapters.iter().map(|(adapter, _)| adapter));
        let mut merged = MergedAdapters::new(adapters)?;
        if let Some(prefixes) = &self.replace_prefix {
            let (from, to) = prefixes.split_once('=').ok_or_else(|| {
                Error::Usage(format!("--replace-prefix {prefixes} is not FROM=TO"))
            })?;
            merged = merged.replace_prefix(from, to)?;
        }
        let folder = merge_folder(&self.base, &merged, &self.out)?;
        for (file, changed) in &folder.weights {
            said += &format!("{file}: {changed} tensors changed\n");
        }
        for (what, files) in [("copied", &folder.copied), ("left out", &folder.left_out)] {
            if !files.is_empty() {
                said += &format!("{what}: {}\n", files.join(", "));
            }
        }
        said += &format!("Wrote {}\n", self.out.display());
        Ok(said)
    }
}

impl Diff {
    fn run(&self) -> Result<String> {
        let first = AdapterWeights::read(&self.first)?;
        let second = AdapterWeights::read(&self.second)?;
        let difference = Difference::between(&first, &second)?;
        if self.json {
            return json(&difference);
        }
        let same = if difference.is_none() {
            "Both do the same, up to rounding\n"
        } else {
            ""
        };
        Ok(format!("{difference}\n{same}"))
    }
}

impl Combine {
    fn run(&self) -> Result<String> {
        check_empty(&self.out)?;
        let adapters = read(&self.adapters, self.any_base)?;
        let combination = Combination {
            method: self.method,
            rank: self.rank,
            density: self.density,
            election: match self.election {
                Signs::Total => Election::Total,
                Signs::Frequency => Election::Frequency,
            },
            seed: self.seed,
        };
        let given = adapters.iter().map(|(adapter, weight)| (adapter, *weight));
        let Combined { adapter, energy } = combination.apply(&given.collect::<Vec<_>>())?;
        adapter.write(&self.out, self.profile)?;

        let mut said = notes(adapters.iter().map(|(adapter, _)| adapter));
        let least = energy
            .iter()
            .min_by(|(_, one), (_, other)| one.total_cmp(other));
        if let Some((path, energy)) = least.filter(|(_, energy)| **energy < 1.0 - 1e-6) {
            // Writing to a string cannot fail.
            let _ = writeln!(
                said,
                "The ranks hold at least {:.2}% of each layer (least: {path})",
                100.0 * energy
            );
        }
        said += &format!(
            "Wrote {} layers to {} in the {} form\n",
            adapter.layers.len(),
            self.out.display(),
            self.profile
        );
        Ok(said)
    }
}

impl FromStr for Weighted {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (adapter, weight) = match text.rsplit_once('=') {
            // A folder may be called `lr=1e-4`.
            Some((adapter, weight)) if !Path::new(text).exists() => {
                let weight = weight
                    .parse()
                    .map_err(|_| format!("`{weight}` is no number; say ADAPTER=WEIGHT"))?;
                (adapter, weight)
            }
            _ => (text, 1.0),
        };
        Ok(Self {
            adapter: adapter.into(),
            weight,
        })
    }
}

fn read(adapters: &[Weighted], any_base: bool) -> Result<Vec<(AdapterWeights, f64)>> {
    let read = adapters.iter().map(|Weighted { adapter, weight }| {
        let mut adapter = AdapterWeights::read(adapter)?;
        if any_base {
            adapter.origin.fingerprint = None;
        }
        Ok((adapter, *weight))
    });
    read.collect()
}

/// What reading the adapters noticed.
fn notes<'a>(adapters: impl IntoIterator<Item = &'a AdapterWeights>) -> String {
    let notes = adapters.into_iter().flat_map(|adapter| &adapter.notes);
    notes.map(|note| format!("note: {note}\n")).collect()
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::Usage(format!("--json: {error}")))?;
    Ok(text + "\n")
}
