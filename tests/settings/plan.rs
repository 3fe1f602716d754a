//! The plan: what it tells, and that it tells the truth without doing anything.

use candle_core::{DType, Device, Tensor};
use lora_core::{
    BiasMode, LoraInit, LoraPlan, LoraTargets, PeftConfig,
    nn::{Linear, RmsNorm},
};
use proptest::prelude::*;

use crate::model::{INNER, Paths, Transformer, WIDTH, WORDS, adapted, refusal};

#[test]
fn a_line_tells_shape_rank_scaling_size_and_saved_activations() {
    let mut model = Transformer::new();
    let config = PeftConfig::new(["up_proj", "v_proj"])
        .dim(4)
        .alpha(6.0)
        .rank_pattern([("up_proj", 2)])
        .lora_dtype(DType::BF16)
        .exclude(["layers.0.*", "*.experts.1.*"]);
    let plan = model.lora_plan(&config).unwrap();
    let [v, up, ..] = plan.adapted.as_slice() else {
        panic!("{plan}")
    };
    assert_eq!(
        (v.path.as_str(), up.path.as_str()),
        ("layers.1.v_proj", "layers.1.mlp.experts.0.up_proj")
    );
    assert_eq!((up.in_features, up.out_features), (WIDTH, INNER));
    assert_eq!((up.rank, up.alpha, up.scaling), (2, 6.0, 3.0));
    assert_eq!(up.parameters, 2 * (WIDTH + INNER));
    assert_eq!(up.bytes, 2 * up.parameters); // bf16
    assert_eq!(up.saved_bytes_per_token, 4 * WIDTH + 4 * 2); // x and the rank product, f32
    assert_eq!((v.rank, v.scaling, v.parameters), (4, 1.5, 4 * 2 * WIDTH));

    let adapters = 2 * (4 * 2 * WIDTH + 2 * (WIDTH + INNER));
    assert_eq!(plan.trainable_parameters(), adapters);
    assert_eq!(plan.trainable_bytes(), 2 * adapters);
    assert_eq!(
        plan.saved_bytes_per_token(),
        2 * 4 * (WIDTH + 4 + WIDTH + 2)
    );
    let report = model.apply_lora(&config).unwrap();
    assert_eq!(plan.base_parameters, report.base_parameters);
    assert_eq!(plan.trainable_parameters(), report.trainable_parameters());
}

#[test]
fn half_and_double_bases_save_inputs_of_their_own_width() {
    for (base, bytes) in [
        (DType::BF16, 2 * 3 + 4 * 2),
        (DType::F32, 4 * 3 + 4 * 2),
        (DType::F64, 8 * 3 + 8 * 2),
    ] {
        let weight = Tensor::zeros((4, 3), base, &Device::Cpu).unwrap();
        let mut model = Paths::one("q", Linear::new(weight, None));
        let plan = model.lora_plan(&PeftConfig::new(["q"]).dim(2)).unwrap();
        assert_eq!(plan.adapted[0].saved_bytes_per_token, bytes, "{base:?}");
    }
}

#[test]
fn what_is_trained_whole_is_counted_in_the_type_of_its_copy() {
    #[derive(LoraTargets)]
    struct Half {
        norm: RmsNorm,
        q: Linear,
        #[lora(head)]
        head: Linear,
    }
    let half = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
    let mut model = Half {
        norm: RmsNorm::new(half(&[5]), 1e-5),
        q: Linear::new(half(&[5, 5]), None),
        head: Linear::new(half(&[3, 5]), None),
    };
    let config = PeftConfig::new(["q"]).modules_to_save(["norm", "head"]);
    let plan = model.lora_plan(&config).unwrap();
    let sizes: Vec<_> = plan
        .trained
        .iter()
        .map(|it| (it.parameters, it.bytes))
        .collect();
    assert_eq!(sizes, [(5, 2 * 5), (15, 4 * 15)]);
}

#[test]
fn a_bias_of_the_adapter_is_counted() {
    let config = PeftConfig::new(["q"]).dim(2).lora_bias(true);
    let plan = Paths::new(["q"]).lora_plan(&config).unwrap();
    assert_eq!(plan.adapted[0].parameters, 2 * (3 + 4) + 4);
    assert_eq!(plan.adapted[0].bytes, 4 * plan.adapted[0].parameters);
}

#[test]
fn it_prints_what_is_adapted_trained_and_left_and_why() {
    let config = PeftConfig::new(["q_proj", "gate"])
        .dim(8)
        .exclude(["*.gate"])
        .layers_to_transform([0, 2])
        .modules_to_save(["lm_head", "pooler"])
        .bias(BiasMode::LoraOnly);
    let text = Transformer::new().lora_plan(&config).unwrap().to_string();
    let line = |start: &str| {
        let line = text.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("{start} is not in\n{text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        line("adapted"),
        "adapted in x out r alpha scaling parameters bytes saved/token"
    );
    assert_eq!(
        line("layers.2.q_proj"),
        "layers.2.q_proj 6 x 6 8 32 4 96 384 56 rank exceeds min(in, out)"
    );
    assert_eq!(
        line("lm_head.weight"),
        "lm_head.weight 48 192 modules_to_save `lm_head`"
    );
    assert_eq!(
        line("pooler.norm.bias"),
        "pooler.norm.bias 6 24 modules_to_save `pooler`"
    );
    assert_eq!(
        line("layers.0.q_proj.bias"),
        "layers.0.q_proj.bias 6 24 bias"
    );
    assert_eq!(
        line("layers.1.q_proj"),
        "layers.1.q_proj layer 1 is not to be transformed"
    );
    assert_eq!(line("layers.0.v_proj"), "layers.0.v_proj not targeted");
    assert_eq!(
        line("layers.0.mlp.gate"),
        "layers.0.mlp.gate excluded by `*.gate`"
    );
    assert_eq!(
        line("pooler.dense  "),
        "pooler.dense trained whole, by modules_to_save `pooler`"
    );
    let block = 2 * WIDTH * WIDTH + 3 * WIDTH + 2 * WIDTH + 4 * WIDTH * INNER;
    let base = 2 * WORDS * WIDTH + 3 * block + WIDTH * WIDTH + 3 * WIDTH;
    let trainable = 2 * 96 + 2 * WIDTH + WORDS * WIDTH + WIDTH * WIDTH + 3 * WIDTH;
    let share = 100.0 * trainable as f64 / (base + trainable) as f64;
    assert!(
        text.contains(&format!(
            "trainable parameters: {trainable} of {} ({share:.3} %), 1.2 KiB",
            base + trainable
        )),
        "{text}"
    );
    assert!(
        text.ends_with("saved for the backward pass: at most 112 bytes a token"),
        "{text}"
    );
    assert!(text.contains("2 layers adapted, 21 not;"), "{text}");
}

#[test]
fn serde_writes_it_and_reads_it_back() {
    let config = PeftConfig::new(["q_proj"])
        .layers_to_transform([1])
        .modules_to_save(["pooler"])
        .bias(BiasMode::All);
    let plan = Transformer::new().lora_plan(&config).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<LoraPlan>(&text).unwrap(), plan);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["adapted"][0]["path"], "layers.1.q_proj");
    assert_eq!(value["not_adapted"][0]["reason"]["other_layer"], 0);
    assert_eq!(value["trained"][0]["reason"], "bias");
}

/// The weights have 2^60 numbers each, in one place of memory; an adapter of rank 64 would take
/// 512 GiB.
#[test]
fn nothing_is_allocated_for_an_adapter() {
    let vast = Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap();
    let vast = vast.broadcast_as((1 << 30, 1 << 30)).unwrap();
    let mut model = Paths::one("q", Linear::new(vast, None));
    for init in [LoraInit::Xavier, LoraInit::Orthogonal, LoraInit::RandomB] {
        let config = PeftConfig::new(["q"])
            .dim(64)
            .lora_a_init(init)
            .lora_bias(false);
        let plan = model.lora_plan(&config).unwrap();
        assert_eq!(plan.trainable_bytes(), 4 * 64 * (1 << 31));
        assert!(plan.to_string().contains("512 GiB"), "{plan}");
    }
}

#[test]
fn planning_changes_nothing() {
    let mut model = Transformer::new();
    let id = model.lm_head.weight().id();
    model.lora_plan(&PeftConfig::new(["*"])).unwrap();
    assert_eq!(model.lm_head.weight().id(), id);
    assert!(model.lora_report().unwrap().sites.is_empty());
}

#[test]
fn it_fails_where_applying_fails() {
    let weight = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    for (weight, config, message) in [
        (
            weight(&[2, 3, 4], DType::F32),
            PeftConfig::new(["q"]),
            "q: the weight has shape [2, 3, 4]; it must be [out, in]",
        ),
        (
            weight(&[2, 3], DType::U8),
            PeftConfig::new(["q"]),
            "q: a base of u8 can't be adapted",
        ),
        (
            weight(&[2, 3], DType::F32),
            PeftConfig::new(["q"]).dim(usize::MAX),
            "q: no memory holds an adapter of rank 18446744073709551615",
        ),
        (
            weight(&[2, 3], DType::F32),
            PeftConfig::new(["q"]).dim(isize::MAX as usize / 8),
            "q: no memory holds an adapter of rank",
        ),
        (
            weight(&[2, 3], DType::F32),
            PeftConfig::new(["q"]).rank_pattern([("q", usize::MAX)]),
            "q: no memory holds an adapter of rank",
        ),
        (
            weight(&[2, 3], DType::F32),
            PeftConfig::new(["q"]).dim(0),
            "PeftConfig.dim: ",
        ),
    ] {
        let error = refusal(Paths::one("q", Linear::new(weight, None)), &config);
        assert!(error.starts_with(message), "{error}\nlacks\n{message}");
    }
}

#[test]
fn it_fails_on_a_model_that_has_been_applied_to_or_is_merged() {
    let config = PeftConfig::new(["q_proj"]).modules_to_save(["embed"]);
    let disagree = |model: &mut Transformer| {
        let planned = model.lora_plan(&config).unwrap_err().to_string();
        assert_eq!(model.apply_lora(&config).unwrap_err().to_string(), planned);
        planned
    };
    let mut model = Transformer::new();
    model.apply_lora(&config).unwrap();
    let error = disagree(&mut model);
    assert!(error.contains("carries an adapter already"), "{error}");

    // Adapters of other names are in nobody's way, but for what only one of them can train.
    let mut model = Transformer::new();
    model
        .add_adapter("other", &PeftConfig::new(["v_proj"]))
        .unwrap();
    assert_eq!(model.lora_plan(&config).unwrap().adapted.len(), 3);
    model
        .add_adapter(
            "saving",
            &PeftConfig::new(["v_proj"]).modules_to_save(["norm"]),
        )
        .unwrap();
    let error = disagree(&mut model);
    assert!(
        error.contains("`embed.weight`") && error.contains("`saving`"),
        "{error}"
    );

    let mut model = Transformer::new();
    model
        .add_adapter("other", &PeftConfig::new(["v_proj"]))
        .unwrap();
    model.set_adapter("other").unwrap();
    model.merge().unwrap();
    disagree(&mut model);
}

/// None or one of these, the former three times out of four.
fn perhaps<T: Clone + std::fmt::Debug + 'static>(
    of: &'static [T],
) -> impl Strategy<Value = Vec<T>> {
    let one = prop::sample::select(of);
    prop::option::weighted(0.25, one).prop_map(|one| one.into_iter().collect())
}

/// Configurations of names that are there, and a few that are not.
fn configs() -> impl Strategy<Value = PeftConfig> {
    let targets = [
        "q_proj",
        "*proj",
        "*.experts.0.*",
        "lm_head",
        "pooler.dense",
        "k_proj",
        "re:.*v.*",
    ];
    let targets = prop::collection::vec(prop::sample::select(targets.to_vec()), 0..3);
    let targets = prop::option::weighted(0.7, targets);
    let excluded = perhaps(&["v_proj", "layers.1.*", "lm_head", "nothing", "*"]);
    let keys = [
        "q_proj",
        "layers.0.*",
        ".*proj",
        "up_proj",
        "^lm_head",
        "nothing",
        "(",
    ];
    let ranks = prop::collection::btree_map(prop::sample::select(keys.to_vec()), 0usize..6, 0..2);
    let alphas = perhaps(&[("q_proj", 0.0), ("q_proj", 1.5), (".*proj", 2.0)]);
    let layers = perhaps(&[0, 1, 2, 3]);
    let lists = perhaps(&["layers", "experts", "h"]);
    let saved = perhaps(&["norm", "pooler", "lm_head", "embed", "layers", "head"]);
    let biases = perhaps(&[BiasMode::All, BiasMode::LoraOnly]);
    let init = prop::sample::select(vec![
        LoraInit::Kaiming,
        LoraInit::Orthogonal,
        LoraInit::RandomB,
    ]);
    let adapter = (init, 0usize..5, any::<bool>(), any::<bool>());
    (
        targets,
        excluded,
        (ranks, alphas),
        (layers, lists),
        (saved, biases),
        adapter,
    )
        .prop_map(
            |(targets, excluded, (ranks, alphas), (layers, lists), (saved, biases), adapter)| {
                let (init, dim, lora_bias, rslora) = adapter;
                targets
                    .map_or_else(PeftConfig::all_linear, PeftConfig::new)
                    .exclude(excluded)
                    .rank_pattern(ranks)
                    .alpha_pattern(alphas)
                    .layers_to_transform(layers)
                    .layers_pattern(lists)
                    .modules_to_save(saved)
                    .bias(biases.first().copied().unwrap_or_default())
                    .lora_a_init(init)
                    .dim(dim)
                    .lora_bias(lora_bias)
                    .use_rslora(rslora)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_planned_is_what_is_applied(config in configs()) {
        let mut model = Transformer::new();
        let planned = model.lora_plan(&config);
        match (planned, model.apply_lora(&config)) {
            (Ok(plan), Ok(report)) => {
                let paths: Vec<_> = report.sites.iter().map(|site| site.path.as_str()).collect();
                prop_assert_eq!(adapted(&plan), paths);
                prop_assert_eq!(plan.trainable_parameters(), report.trainable_parameters());
                prop_assert_eq!(plan.adapted.len() + plan.not_adapted.len(), 23);
                for (planned, site) in plan.adapted.iter().zip(&report.sites) {
                    prop_assert_eq!((planned.rank, planned.alpha), (site.rank, site.alpha));
                    let vars = model.named_lora_vars().unwrap().into_iter();
                    let own = vars.filter(|(name, _)| name.starts_with(&format!("{}.", site.path)));
                    let bytes = own.map(|(_, var)| var.elem_count() * 4);
                    let whole = plan.trained.iter().filter(|it| it.path == site.path);
                    let whole: usize = whole.map(|it| it.bytes).sum();
                    prop_assert_eq!(bytes.sum::<usize>(), planned.bytes + whole);
                }
            }
            (Err(planned), Err(applied)) => {
                prop_assert_eq!(planned.to_string(), applied.to_string());
            }
            (planned, applied) => prop_assert!(false, "{:?}\n{:?}", planned, applied),
        }
    }
}
