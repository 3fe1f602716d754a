//! The folder in which Hugging Face PEFT keeps an adapter.
//!
//! `adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` `[rank, in]` and
//! `.lora_B.weight` `[out, rank]` for every adapted layer; `adapter_config.json` says how they act.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use candle_core::{Device, Tensor};

use crate::{
    AdapterConfig, DropoutPosition, Error, LinearLoRA, LoraInit, LoraReport, LoraSite, LoraTargets,
    Result, apply, atomic,
    hf_config::{HfConfig, HfSettings},
    select::type_name,
    suggest::Nearest,
    survey::{Site, Survey},
};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const PREFIX: &str = "base_model.model.";

/// The body of [`LoraTargets::save_adapter`].
pub(crate) fn save<M: LoraTargets>(model: &mut M, dir: &Path) -> Result<()> {
    let (mut sites, mut dropout, mut tensors) = (Vec::new(), 0.0, BTreeMap::new());
    model.for_each_adapter(&mut |lora| {
        sites.push(LoraSite {
            // The file says no rsLoRA, and scales by `alpha / rank` alone.
            alpha: match lora.is_rslora() {
                true => lora.scaling() * lora.rank() as f64,
                false => lora.alpha(),
            },
            ..LoraSite::of(lora)
        });
        dropout = lora.dropout();
        for (name, var) in [("lora_A", lora.lora_a()), ("lora_B", lora.lora_b())] {
            let key = format!("{PREFIX}{}.{name}.weight", lora.path());
            tensors.insert(key, var.as_tensor().to_device(&Device::Cpu)?.contiguous()?);
        }
        Ok(())
    })?;
    if sites.is_empty() {
        let reason = format!("`{}` has no adapter to save", type_name::<M>());
        return Err(Error::file(dir, reason));
    }
    let others: Vec<String> = Survey::of(model)?
        .sites
        .into_iter()
        .filter(|site| !site.adapted)
        .map(|site| site.path)
        .collect();
    let mut config = serde_json::to_string_pretty(&HfConfig::of(&sites, &others, dropout))
        .map_err(|error| Error::file(dir.join(CONFIG), error))?;
    config.push('\n');
    // One entry only: the writer keeps them in a hash map, and the bytes must not depend on it.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let weights = safetensors::serialize(&tensors, Some(metadata))
        .map_err(|error| Error::file(dir.join(WEIGHTS), error))?;

    fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
    let path = dir.join(CONFIG);
    let same = fs::read(&path).is_ok_and(|old| old == config.as_bytes());
    if !same && path.exists() {
        // Weights must never stand beside the configuration of others, which could load.
        fs::remove_file(&path).map_err(|error| Error::file(&path, error))?;
    }
    atomic::write(&dir.join(WEIGHTS), &weights)?;
    if !same {
        atomic::write(&path, config.as_bytes())?;
    }
    Ok(())
}

/// The body of [`LoraTargets::load_adapter`].
pub(crate) fn load<M: LoraTargets>(model: &mut M, dir: &Path) -> Result<LoraReport> {
    let config_file = dir.join(CONFIG);
    let text =
        fs::read_to_string(&config_file).map_err(|error| Error::file(&config_file, error))?;
    let settings = HfSettings::parse(&text).map_err(|reason| Error::file(&config_file, reason))?;
    let file = dir.join(WEIGHTS);
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu)
        .map_err(|error| Error::file(&file, error))?;

    let survey = Survey::of(model)?;
    let mut problems = Vec::new();
    let pairs = pairs(tensors, &mut problems);
    let known: HashMap<&str, &Site> = survey
        .sites
        .iter()
        .map(|site| (site.path.as_str(), site))
        .collect();
    for path in pairs
        .keys()
        .filter(|path| !known.contains_key(path.as_str()))
    {
        let mut nearest = Nearest::new(path);
        survey
            .sites
            .iter()
            .for_each(|site| nearest.offer(&site.path));
        problems.push(nearest.message(&type_name::<M>()).as_str().to_string());
    }

    let mut adapters = Vec::new();
    for site in &survey.sites {
        match pairs.get(&site.path) {
            Some(pair) => match adapter(site, pair, &settings) {
                Ok(lora) => adapters.push(lora),
                Err(problem) => problems.push(problem),
            },
            None if site.adapted || settings.calls_for(&site.path) => {
                problems.push(format!("`{PREFIX}{}.lora_A.weight` is missing", site.path));
            }
            None => {}
        }
    }
    let adapted = survey.sites.iter().any(|site| site.adapted);
    if adapted {
        let mut loaded = adapters
            .iter()
            .map(|lora| (lora.path(), lora))
            .collect::<HashMap<_, _>>();
        model.for_each_adapter(&mut |lora| {
            if let Some(new) = loaded.remove(lora.path())
                && (new.rank() != lora.rank() || new.scaling() != lora.scaling())
            {
                problems.push(format!(
                    "`{}` has rank {} and scaling {} in the file, {} and {} in the model",
                    lora.path(),
                    new.rank(),
                    new.scaling(),
                    lora.rank(),
                    lora.scaling(),
                ));
            }
            Ok(())
        })?;
        problems.extend(
            loaded
                .keys()
                .map(|path| format!("`{path}` carries no adapter in the model")),
        );
    }
    if !problems.is_empty() {
        problems.sort();
        return Err(Error::Checkpoint { file, problems });
    }
    if !adapted {
        for lora in &mut adapters {
            lora.set_training(false);
        }
        return apply::attach(model, &survey, adapters);
    }
    let loaded = adapters
        .iter()
        .map(|lora| (lora.path(), lora))
        .collect::<HashMap<_, _>>();
    model.for_each_adapter(&mut |lora| {
        if let Some(new) = loaded.get(lora.path()) {
            for (to, from) in [(lora.lora_a(), new.lora_a()), (lora.lora_b(), new.lora_b())] {
                to.set(&from.as_tensor().to_dtype(to.dtype())?)?;
            }
        }
        lora.set_training(false);
        Ok(())
    })?;
    model.lora_report()
}

/// `A` and `B` of a layer, as far as the file has them.
type Pair = [Option<Tensor>; 2];

/// Sorts the tensors by layer; reports keys that are of no LoRA.
fn pairs(tensors: HashMap<String, Tensor>, problems: &mut Vec<String>) -> BTreeMap<String, Pair> {
    let mut pairs = BTreeMap::<String, Pair>::new();
    for (key, tensor) in tensors {
        let part = |suffix| {
            let path = key.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
            path.strip_suffix(suffix)
                .or_else(|| path.strip_suffix(&format!("{suffix}.default")))
        };
        let (index, path) = match (part(".lora_A"), part(".lora_B")) {
            (Some(path), _) => (0, path),
            (_, Some(path)) => (1, path),
            _ => {
                problems.push(format!(
                    "`{key}` is not `{PREFIX}<layer>.lora_A.weight` or `.lora_B.weight`"
                ));
                continue;
            }
        };
        pairs.entry(path.to_string()).or_default()[index] = Some(tensor);
    }
    pairs
}

/// The adapter of one site, or what is wrong with it.
fn adapter(site: &Site, pair: &Pair, settings: &HfSettings) -> Result<LinearLoRA, String> {
    let path = &site.path;
    let [Some(a), Some(b)] = pair else {
        let name = if pair[0].is_none() {
            "lora_A"
        } else {
            "lora_B"
        };
        return Err(format!("`{PREFIX}{path}.{name}.weight` is missing"));
    };
    let (outputs, inputs) = site.weight.dims2().map_err(|error| error.to_string())?;
    let rank = settings.rank(path)?;
    for (name, tensor, expected) in [
        ("lora_A", a, [rank, inputs]),
        ("lora_B", b, [outputs, rank]),
    ] {
        if tensor.dims() != expected {
            return Err(format!(
                "`{PREFIX}{path}.{name}.weight` has shape {:?}; with rank {rank} it must be {expected:?}",
                tensor.dims(),
            ));
        }
    }
    let config = AdapterConfig {
        dim: rank,
        alpha: settings.alpha(path, rank)?,
        dropout: settings.lora_dropout,
        dropout_position: DropoutPosition::Pre,
        lora_a_init: LoraInit::default(),
        lora_dtype: Some(a.dtype()),
        use_fused: true,
        seed: 0,
        // `settings.alpha` has the root of the rank in it.
        rslora: false,
        lora_bias: false,
    };
    let build = || {
        let on_device = |tensor: &Tensor| tensor.to_device(site.weight.device());
        let tensors = (on_device(a)?, on_device(b)?);
        let (weight, bias) = (site.weight.clone(), site.bias.clone());
        LinearLoRA::from_tensors(path, weight, bias, tensors, &config.checked()?)
    };
    build().map_err(|error| format!("{path}: {error}"))
}
