//! The verbs of a model: apply, train, save, load, merge.

use std::{collections::BTreeMap, fs};

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarBuilder;
use lora_core::{
    Error, LoraTargets, PeftConfig,
    nn::{Linear, linear, linear_no_bias},
    targets,
};
use lora_tests::{randn, relative_error, to_vec};

const WIDTH: usize = 12;

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    v_proj: Linear,
}

#[derive(LoraTargets)]
struct Block {
    self_attn: Attention,
    up_proj: Linear,
    gate: Option<Linear>,
}

#[derive(LoraTargets)]
struct Model {
    #[lora(rename = "model.layers")]
    layers: Vec<Block>,
    #[lora(head)]
    lm_head: Linear,
}

impl Model {
    fn new(layers: usize, vb: VarBuilder) -> Result<Self> {
        let block = |i| {
            let vb = vb.pp(format!("model.layers.{i}"));
            Ok(Block {
                self_attn: Attention {
                    q_proj: linear(WIDTH, WIDTH, vb.pp("self_attn.q_proj"))?,
                    v_proj: linear_no_bias(WIDTH, WIDTH, vb.pp("self_attn.v_proj"))?,
                },
                up_proj: linear_no_bias(WIDTH, WIDTH, vb.pp("up_proj"))?,
                gate: None,
            })
        };
        Ok(Self {
            layers: (0..layers).map(block).collect::<Result<_>>()?,
            lm_head: linear_no_bias(WIDTH, 5, vb.pp("lm_head"))?,
        })
    }

    fn random(layers: usize, dtype: DType) -> Self {
        let mut tensors = std::collections::HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let tensor = randn(tensors.len() as u32, shape, DType::F64);
            let tensor = (tensor * 0.3)
                .and_then(|tensor| tensor.to_dtype(dtype))
                .unwrap();
            tensors.insert(name, tensor);
        };
        for i in 0..layers {
            for name in ["self_attn.q_proj", "self_attn.v_proj", "up_proj"] {
                add(format!("model.layers.{i}.{name}.weight"), &[WIDTH, WIDTH]);
            }
            add(format!("model.layers.{i}.self_attn.q_proj.bias"), &[WIDTH]);
        }
        add("lm_head.weight".into(), &[5, WIDTH]);
        let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
        Self::new(layers, vb).unwrap()
    }

    /// Fills every `B`, so that the adapters act.
    fn randomise(&mut self) {
        for (i, (name, var)) in self.named_lora_vars().unwrap().into_iter().enumerate() {
            if name.ends_with("lora_B.weight") {
                var.set(&randn(100 + i as u32, var.shape(), var.dtype()))
                    .unwrap();
            }
        }
    }

    fn paths(&mut self) -> Vec<String> {
        let report = self.lora_report().unwrap();
        report.sites.into_iter().map(|site| site.path).collect()
    }

    /// Everything that could have changed, by path.
    fn snapshot(&mut self) -> BTreeMap<String, (Vec<f64>, bool)> {
        let mut all = BTreeMap::new();
        self.for_each_linear(&mut |path, linear| {
            all.insert(
                path.to_string(),
                (to_vec(linear.weight()), linear.lora().is_some()),
            );
            Ok(())
        })
        .unwrap();
        all
    }
}

impl Module for Model {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let mut xs = xs.clone();
        for block in &self.layers {
            let q = block.self_attn.q_proj.forward(&xs)?.tanh()?;
            let v = block.self_attn.v_proj.forward(&xs)?;
            xs = (xs + block.up_proj.forward(&(q * v)?)?)?;
        }
        self.lm_head.forward(&xs)
    }
}

fn input(dtype: DType) -> Tensor {
    randn(77, (3, 4, WIDTH), dtype)
}

/// No gradient is kept for a weight or a bias of the base.
fn no_base_gradient(model: &mut Model, grads: &candle_core::backprop::GradStore) {
    model
        .for_each_linear(&mut |path, linear| {
            assert!(grads.get(linear.weight()).is_none(), "{path}.weight");
            let bias = linear.bias().and_then(|bias| grads.get(bias));
            assert!(bias.is_none(), "{path}.bias");
            Ok(())
        })
        .unwrap();
    // Nor for a transposed view of it, under which candle's product would keep it.
    let shapes = grads
        .get_ids()
        .filter_map(|id| grads.get_id(*id))
        .map(|grad| grad.dims());
    assert!(shapes.filter(|dims| **dims == [WIDTH, WIDTH]).count() == 0);
}

#[test]
fn adapts_what_is_named_and_freezes_the_rest() {
    let mut model = Model::random(3, DType::F32);
    let config = PeftConfig::new(targets!(Model: ["*.q_proj", "model.layers.1.*"])).dim(2);
    let report = model.apply_lora(&config).unwrap();
    let want = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.up_proj",
        "model.layers.2.self_attn.q_proj",
    ];
    assert_eq!(
        report
            .sites
            .iter()
            .map(|site| &site.path)
            .collect::<Vec<_>>(),
        want
    );
    assert_eq!(report.trainable_parameters(), want.len() * 2 * 2 * WIDTH);
    assert_eq!(
        report.base_parameters,
        9 * WIDTH * WIDTH + 3 * WIDTH + 5 * WIDTH
    );
    let table = report.to_string();
    assert!(
        table.contains("model.layers.1.up_proj") && table.contains("trainable parameters: 240 of"),
        "{table}"
    );

    let grads = model
        .forward(&input(DType::F32))
        .unwrap()
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap();
    let grads = grads.backward().unwrap();
    model.check_gradients(&grads).unwrap();
    no_base_gradient(&mut model, &grads);
}

#[test]
fn a_model_of_variables_is_frozen_whole() {
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let mut model = Model::new(1, vb).unwrap();
    let config = PeftConfig::new(["q_proj"]).dim(2);
    model.apply_lora(&config).unwrap();
    let loss = model
        .forward(&input(DType::F32))
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    model.check_gradients(&grads).unwrap();
    no_base_gradient(&mut model, &grads);
    assert!(vars.all_vars().iter().all(|var| grads.get(var).is_none()));
}

#[test]
fn a_tied_weight_counts_once_and_stays_shared() {
    #[derive(LoraTargets)]
    struct Tied {
        embed: lora_core::nn::Embedding,
        proj: Linear,
        #[lora(head)]
        lm_head: Linear,
    }
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let embed = lora_core::nn::embedding(7, 4, vb.pp("embed")).unwrap();
    let mut model = Tied {
        lm_head: Linear::new(embed.embeddings().clone(), None),
        proj: linear_no_bias(4, 4, vb.pp("proj")).unwrap(),
        embed,
    };
    let report = model.apply_lora(&PeftConfig::all_linear()).unwrap();
    assert_eq!(report.base_parameters, 7 * 4 + 4 * 4);
    assert_eq!(model.lora_report().unwrap(), report);
    assert!(!model.embed.embeddings().is_variable());
    assert_eq!(model.embed.embeddings().id(), model.lm_head.weight().id());

    // Merging the head leaves the embedding alone.
    model.remove_adapters().unwrap();
    model.apply_lora(&PeftConfig::new(["lm_head"])).unwrap();
    let before = to_vec(model.embed.embeddings());
    model
        .lm_head
        .lora()
        .unwrap()
        .lora_b()
        .set(&randn(1, (7, 8), DType::F32))
        .unwrap();
    model.merge().unwrap();
    assert_ne!(to_vec(model.lm_head.weight()), before);
    assert_eq!(to_vec(model.embed.embeddings()), before);
}

#[test]
fn all_linear_leaves_the_head_and_exclusion_wins() {
    let adapted = |config: PeftConfig| {
        let mut model = Model::random(1, DType::F32);
        model.apply_lora(&config).unwrap();
        model.paths()
    };
    let (q, v, up) = (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.up_proj",
    );
    assert_eq!(adapted(PeftConfig::all_linear()), [q, v, up]);
    assert_eq!(
        adapted(PeftConfig::all_linear().exclude(["v_proj"])),
        [q, up]
    );
    let none: [&str; 0] = [];
    assert_eq!(
        adapted(PeftConfig::new(none).exclude(["*.self_attn.*"])),
        [up]
    );
    assert_eq!(adapted(PeftConfig::new(["lm_head"])), ["lm_head"]);
    assert_eq!(adapted(PeftConfig::new(["*"])), [q, v, up, "lm_head"]);
    assert_eq!(
        adapted(PeftConfig::new(["*_proj"]).exclude(["up_proj", "v_proj"])),
        [q]
    );
    assert_eq!(adapted(PeftConfig::new([r"re:.*\.(q|v)_proj"])), [q, v]);
}

#[test]
fn what_cannot_be_adapted_is_an_error_and_changes_nothing() {
    let refused = |config: PeftConfig| {
        let mut model = Model::random(2, DType::F32);
        let before = model.snapshot();
        let error = model.apply_lora(&config).unwrap_err().to_string();
        assert_eq!(model.snapshot(), before);
        error
    };
    let none: [&str; 0] = [];
    let cases = [
        (
            PeftConfig::new(["*.q_proj", "*.q_porj"]),
            "no linear layer of `Model` matches `*.q_porj`; nearest: `model.layers.*.self_attn.q_proj`",
        ),
        (
            PeftConfig::new(["model.layers.2.*"]),
            "no linear layer of `this Model` matches `model.layers.2.*`; nearest: `model.layers.",
        ),
        (
            PeftConfig::new(["gate"]),
            "no linear layer of `this Model` matches `gate`",
        ),
        (
            PeftConfig::new(["q_proj"]).exclude(["o_proj"]),
            "no linear layer of `Model` matches `o_proj`",
        ),
        (
            PeftConfig::new(["re:.*k_proj"]),
            "no linear layer of `this Model` matches `re:.*k_proj`",
        ),
        (
            PeftConfig::new(["re:("]),
            "PeftConfig.target_modules: `re:(`: ",
        ),
        (
            PeftConfig::new([""]),
            "PeftConfig.target_modules: `` is no pattern",
        ),
        (
            PeftConfig::new(["q_proj"]).exclude(["*"]),
            "is left to adapt",
        ),
        (
            PeftConfig::new(none),
            "PeftConfig.target_modules: names nothing",
        ),
        (PeftConfig::new(["q_proj"]).dim(0), "PeftConfig.dim: "),
        (PeftConfig::new(["q_proj"]).alpha(0.0), "PeftConfig.alpha: "),
        (
            PeftConfig::new(["q_proj"]).alpha(f64::NAN),
            "PeftConfig.alpha: ",
        ),
        (
            PeftConfig::new(["q_proj"]).dropout(1.0),
            "PeftConfig.dropout: ",
        ),
        (
            PeftConfig::new(["q_proj"]).lora_dtype(DType::U8),
            "PeftConfig.lora_dtype: ",
        ),
    ];
    for (config, message) in cases {
        let error = refused(config);
        assert!(error.contains(message), "{error}\nlacks\n{message}");
    }
}

#[test]
fn a_second_application_is_refused_until_the_first_is_taken_off() {
    let mut model = Model::random(1, DType::F32);
    let config = PeftConfig::new(["q_proj"]);
    model.apply_lora(&config).unwrap();
    model.randomise();
    let before = to_vec(&model.lm_head.forward(&input(DType::F32)).unwrap());
    let error = model
        .apply_lora(&PeftConfig::new(["v_proj"]))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("model.layers.0.self_attn.q_proj: it carries an adapter already"),
        "{error}"
    );
    assert_eq!(model.paths(), ["model.layers.0.self_attn.q_proj"]);
    model.remove_adapters().unwrap();
    assert_eq!(
        to_vec(&model.lm_head.forward(&input(DType::F32)).unwrap()),
        before
    );
    model.apply_lora(&config).unwrap();
}

#[test]
fn a_layer_loaded_from_elsewhere_is_an_error() {
    #[derive(LoraTargets)]
    struct Renamed {
        wq: Linear,
    }
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mut model = Renamed {
        wq: linear_no_bias(4, 4, vb.pp("attn.q_proj")).unwrap(),
    };
    let error = model
        .apply_lora(&PeftConfig::new(["wq"]))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("wq: its weights came from `attn.q_proj`"),
        "{error}"
    );
    assert!(error.contains("#[lora(rename"), "{error}");
}

#[test]
fn two_layers_of_one_path_are_an_error() {
    #[derive(LoraTargets)]
    struct Inner {
        proj: Linear,
    }
    #[derive(LoraTargets)]
    struct Twice {
        #[lora(flatten)]
        inner: Inner,
        proj: Linear,
    }
    let layer = || Linear::new(randn(1, (3, 3), DType::F32), None);
    let mut model = Twice {
        inner: Inner { proj: layer() },
        proj: layer(),
    };
    let error = model
        .apply_lora(&PeftConfig::new(["proj"]))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("proj: two linear layers have this path"),
        "{error}"
    );
}

#[test]
fn initialisation_depends_on_seed_and_path_alone() {
    let first = |layers, patterns: &[&str], seed| {
        let mut model = Model::random(layers, DType::F32);
        model
            .apply_lora(&PeftConfig::new(patterns.iter().copied()).seed(seed))
            .unwrap();
        let vars = model.named_lora_vars().unwrap();
        let (_, a) = vars
            .iter()
            .find(|(name, _)| name == "model.layers.0.self_attn.v_proj.lora_A.weight")
            .unwrap();
        to_vec(a)
    };
    let one = first(1, &["v_proj"], 1);
    assert_eq!(one, first(3, &["*_proj"], 1));
    assert_ne!(one, first(1, &["v_proj"], 2));
}

#[test]
fn disabled_adapters_leave_the_base() {
    let mut model = Model::random(2, DType::F32);
    let xs = input(DType::F32);
    let base = to_vec(&model.forward(&xs).unwrap());
    model.apply_lora(&PeftConfig::all_linear()).unwrap();
    model.randomise();
    let adapted = to_vec(&model.forward(&xs).unwrap());
    assert_ne!(adapted, base);
    model.disable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&xs).unwrap()), base);
    model.enable_adapters().unwrap();
    assert_eq!(to_vec(&model.forward(&xs).unwrap()), adapted);
}

#[test]
fn merging_keeps_the_output_and_unmerging_the_bits() {
    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 1e-5), (DType::BF16, 5e-2)] {
        let mut model = Model::random(2, dtype);
        let xs = input(dtype);
        model
            .apply_lora(&PeftConfig::all_linear().dim(3).alpha(1.0))
            .unwrap();
        model.randomise();
        let adapted = model.forward(&xs).unwrap();
        let before = model.snapshot();
        model.merge().unwrap();
        model.merge().unwrap();
        let error = relative_error(&model.forward(&xs).unwrap(), &adapted);
        assert!(error < bound, "{dtype:?}: {error}");
        model.unmerge().unwrap();
        assert_eq!(model.snapshot(), before);
        assert_eq!(to_vec(&model.forward(&xs).unwrap()), to_vec(&adapted));
    }
}

#[test]
fn a_saved_adapter_loads_and_saves_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(2, DType::F32);
    model
        .apply_lora(
            &PeftConfig::new(["q_proj", "up_proj"])
                .dim(3)
                .alpha(4.5)
                .dropout(0.1),
        )
        .unwrap();
    model.randomise();
    model.eval().unwrap();
    model.save_adapter(dir.path().join("one")).unwrap();

    let mut fresh = Model::random(2, DType::F32);
    let report = fresh.load_adapter(dir.path().join("one")).unwrap();
    assert_eq!(report, model.lora_report().unwrap());
    let xs = input(DType::F32);
    assert_eq!(
        to_vec(&fresh.forward(&xs).unwrap()),
        to_vec(&model.forward(&xs).unwrap())
    );
    fresh.save_adapter(dir.path().join("two")).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let read = |name: &str| fs::read(dir.path().join(name).join(file)).unwrap();
        assert_eq!(read("one"), read("two"), "{file}");
    }

    // Into a model that has the same adapters: the variables stay the same ones.
    let vars = fresh.lora_vars().unwrap();
    vars.iter()
        .for_each(|var| var.set(&var.zeros_like().unwrap()).unwrap());
    fresh.load_adapter(dir.path().join("one")).unwrap();
    assert_eq!(
        to_vec(&fresh.forward(&xs).unwrap()),
        to_vec(&model.forward(&xs).unwrap())
    );
    assert!(vars.iter().all(|var| to_vec(var).iter().any(|v| *v != 0.0)));
    assert_eq!(
        fs::read_dir(dir.path().join("one")).unwrap().count(),
        2,
        "no temporary file is left"
    );
}

#[test]
fn loading_names_every_missing_extra_and_misshaped_key() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(2, DType::F32);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).dim(3))
        .unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let key =
        |layer: usize, end: &str| format!("base_model.model.model.layers.{layer}.self_attn.{end}");
    tensors.remove(&key(0, "q_proj.lora_B.weight")).unwrap();
    tensors.insert(key(1, "q_proj.lora_A.weight"), randn(1, (3, 5), DType::F32));
    tensors.insert(
        key(0, "k_proj.lora_A.weight"),
        randn(1, (3, WIDTH), DType::F32),
    );
    tensors.insert("lm_head.weight".into(), randn(1, (3, 5), DType::F32));
    candle_core::safetensors::save(&tensors, &file).unwrap();

    let mut fresh = Model::random(2, DType::F32);
    let before = fresh.snapshot();
    let error = fresh.load_adapter(dir.path()).unwrap_err();
    let Error::Checkpoint { problems, .. } = &error else {
        panic!("{error}")
    };
    let all = problems.join("\n");
    for part in [
        "`base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight` is missing",
        "`base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight` has shape [3, 5]; with rank 3 it must be [3, 12]",
        "matches `model.layers.0.self_attn.k_proj`; nearest: `model.layers.0.self_attn.",
        "`lm_head.weight` is not `base_model.model.<layer>.lora_A.weight`",
    ] {
        assert!(all.contains(part), "{all}\nlacks\n{part}");
    }
    assert_eq!(fresh.snapshot(), before);
}

#[test]
fn an_adapter_of_other_layers_is_refused_by_an_adapted_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).dim(3))
        .unwrap();
    model.save_adapter(dir.path()).unwrap();
    let load_into = |config: PeftConfig| {
        let mut other = Model::random(1, DType::F32);
        other.apply_lora(&config).unwrap();
        other.load_adapter(dir.path()).unwrap_err().to_string()
    };
    let error = load_into(PeftConfig::new(["v_proj"]).dim(3));
    assert!(
        error.contains("self_attn.v_proj.lora_A.weight` is missing"),
        "{error}"
    );
    assert!(
        error.contains("`model.layers.0.self_attn.q_proj` carries no adapter"),
        "{error}"
    );
    let error = load_into(PeftConfig::new(["q_proj"]).dim(4));
    assert!(error.contains("has rank 3"), "{error}");
    let error = load_into(PeftConfig::new(["q_proj"]).dim(3).alpha(5.0));
    assert!(error.contains("scaling"), "{error}");
}

#[test]
fn settings_that_would_be_lost_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_config.json");
    let saved: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for (key, value) in [
        ("use_dora", serde_json::json!(true)),
        ("bias", serde_json::json!("all")),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("fan_in_fan_out", serde_json::json!(true)),
        ("init_lora_weights", serde_json::json!("pissa")),
        ("peft_type", serde_json::json!("LOHA")),
        ("something_of_tomorrow", serde_json::json!({"on": 1})),
    ] {
        let mut config = saved.clone();
        config[key] = value;
        fs::write(&file, config.to_string()).unwrap();
        let error = Model::random(1, DType::F32)
            .load_adapter(dir.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(key) && error.contains("adapter_config.json"),
            "{error}"
        );
    }
    let mut config = saved.clone();
    config["something_of_tomorrow"] = serde_json::json!(null);
    config["use_rslora"] = serde_json::json!(true);
    fs::write(&file, config.to_string()).unwrap();
    let report = Model::random(1, DType::F32)
        .load_adapter(dir.path())
        .unwrap();
    assert_eq!(report.sites[0].alpha, 32.0 * 8f64.sqrt());
}

#[test]
fn files_that_are_not_there_or_broken_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::random(1, DType::F32);
    let error = model.load_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
    let error = model.save_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no adapter to save"), "{error}");
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    model.save_adapter(dir.path()).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let error = Model::random(1, DType::F32)
        .load_adapter(dir.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(model.save_adapter(dir.path().join("file/folder")).is_err());
}

#[test]
fn adapters_without_a_gradient_are_named() {
    let mut model = Model::random(1, DType::F32);
    model
        .apply_lora(&PeftConfig::all_linear().exclude(["up_proj"]))
        .unwrap();
    let xs = input(DType::F32);
    let attention = &model.layers[0].self_attn;
    // The value's path is cut, as candle_nn's fused operations do.
    let loss = (attention.q_proj.forward(&xs).unwrap()
        * attention.v_proj.forward(&xs).unwrap().detach())
    .unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    let error = model.check_gradients(&grads).unwrap_err();
    let Error::NoGradient { missing, total } = &error else {
        panic!("{error}")
    };
    assert_eq!(*total, 4);
    let v = "model.layers.0.self_attn.v_proj";
    assert_eq!(
        *missing,
        [format!("{v}.lora_A.weight"), format!("{v}.lora_B.weight")]
    );
    assert!(error.to_string().contains("lora_core::nn"), "{error}");
}

#[test]
fn training_lowers_the_loss_and_leaves_the_base() {
    use candle_nn::Optimizer;
    let mut model = Model::random(2, DType::F32);
    let before = model.snapshot();
    model
        .apply_lora(&PeftConfig::all_linear().dim(4).alpha(8.0))
        .unwrap();
    let (xs, want) = (input(DType::F32), randn(5, (3, 4, 5), DType::F32));
    let loss = |model: &Model| (model.forward(&xs)? - &want)?.sqr()?.mean_all();
    let first = loss(&model).unwrap().to_scalar::<f32>().unwrap();
    let mut optimizer = candle_nn::AdamW::new_lr(model.lora_vars().unwrap(), 0.02).unwrap();
    for _ in 0..60 {
        let grads = loss(&model).unwrap().backward().unwrap();
        model.check_gradients(&grads).unwrap();
        optimizer.step(&grads).unwrap();
    }
    let last = loss(&model).unwrap().to_scalar::<f32>().unwrap();
    assert!(last < 0.5 * first, "{first} -> {last}");
    model.remove_adapters().unwrap();
    assert_eq!(model.snapshot(), before);
}

#[test]
fn a_half_base_trains_with_adapters_in_f32() {
    let mut model = Model::random(1, DType::BF16);
    model.apply_lora(&PeftConfig::new(["q_proj"])).unwrap();
    let vars: Vec<Var> = model.lora_vars().unwrap();
    assert!(vars.iter().all(|var| var.dtype() == DType::F32));
    let loss = model
        .forward(&input(DType::BF16))
        .unwrap()
        .sum_all()
        .unwrap();
    let grads = loss.backward().unwrap();
    assert!(
        vars.iter()
            .all(|var| grads.get(var).unwrap().dtype() == DType::F32)
    );

    let mut model = Model::random(1, DType::BF16);
    model
        .apply_lora(&PeftConfig::new(["q_proj"]).lora_dtype(DType::BF16))
        .unwrap();
    assert!(
        model
            .lora_vars()
            .unwrap()
            .iter()
            .all(|var| var.dtype() == DType::BF16)
    );
}
