//! What `apply_lora` adapts, freezes and refuses.

use candle_core::{DType, Device, Module};
use candle_nn::VarBuilder;
use lora_core::{
    LoraTargets, PeftConfig,
    nn::{Linear, linear_no_bias},
    targets,
};
use lora_tests::{randn, to_vec};

use crate::model::{Model, WIDTH, input, no_base_gradient};

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
            "no linear layer of this `Model` matches `model.layers.2.*`; nearest: `model.layers.",
        ),
        (
            PeftConfig::new(["gate"]),
            "no linear layer of this `Model` matches `gate`",
        ),
        (
            PeftConfig::new(["q_proj"]).exclude(["o_proj"]),
            "no linear layer of `Model` matches `o_proj`",
        ),
        (
            PeftConfig::new(["re:.*k_proj"]),
            "no linear layer of this `Model` matches `re:.*k_proj`",
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
