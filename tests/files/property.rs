//! What holds for any adapter.

use std::{collections::BTreeMap, fs};

use candle_core::DType;
use lora_core::{
    BiasMode,
    adapter::{AdapterWeights, Combination, Consumer, Difference, LayerWeights, Method, Profile},
};
use lora_tests::randn;
use proptest::prelude::*;

use crate::support::*;

fn layers() -> impl Strategy<Value = BTreeMap<String, LayerWeights>> {
    let dtype = prop_oneof![
        Just(DType::F32),
        Just(DType::BF16),
        Just(DType::F16),
        Just(DType::F64)
    ];
    let layer = (
        1..6_usize,
        1..9_usize,
        1..9_usize,
        -50.0..50.0f64,
        any::<bool>(),
        any::<bool>(),
        dtype,
        0..99u32,
    )
        .prop_map(
            |(rank, inputs, outputs, alpha, rslora, bias, dtype, seed)| LayerWeights {
                a: randn(seed, (rank, inputs), dtype),
                b: randn(seed + 100, (outputs, rank), dtype),
                bias: bias.then(|| randn(seed + 200, outputs, dtype)),
                alpha,
                rslora,
            },
        );
    let segment = prop_oneof![
        "[a-z_]{1,6}",
        "[0-9]{1,2}",
        Just("lora_A".into()),
        Just("weight".into()),
        "[a-zß-ÿ+ -]{1,4}"
    ];
    let path = prop::collection::vec(segment, 1..4).prop_map(|segments| segments.join("."));
    prop::collection::btree_map(path, layer, 1..6)
}

fn adapters() -> impl Strategy<Value = AdapterWeights> {
    let parts = (layers(), 0.01..0.99f64, any::<bool>(), any::<bool>());
    parts.prop_map(|(layers, dropout, post, saved)| {
        let mut adapter = AdapterWeights {
            layers,
            dropout,
            dropout_position: match post {
                true => lora_core::DropoutPosition::Post,
                false => lora_core::DropoutPosition::Pre,
            },
            ..AdapterWeights::default()
        };
        if saved {
            adapter
                .saved
                .insert("some.lm_head.weight".into(), randn(1, (3, 2), DType::BF16));
            adapter
                .saved
                .insert("norm.bias".into(), randn(1, 2, DType::F32));
            adapter.modules_to_save = vec!["lm_head".into()];
            adapter.bias = BiasMode::All;
        }
        adapter
    })
}

/// Whether a path could be read as one of PEFT's own names.
fn is_ambiguous(adapter: &AdapterWeights) -> bool {
    let dir = tempfile::tempdir().unwrap();
    match adapter.write(dir.path(), Profile::Peft) {
        Ok(()) => false,
        Err(error) => {
            assert_says(&error.to_string(), &["can't be told from PEFT's own names"]);
            true
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read_back_and_written_to_the_same_bytes(adapter in adapters()) {
        prop_assume!(!is_ambiguous(&adapter));
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        adapter.write(&one, Profile::Peft).unwrap();
        let read = AdapterWeights::read(&one).unwrap();
        prop_assert_eq!(&read.notes, &Vec::<String>::new());
        prop_assert_eq!(read.dropout_position, adapter.dropout_position);
        for (path, layer) in &adapter.layers {
            let twin = &read.layers[path];
            prop_assert_eq!(bits(&layer.a), bits(&twin.a));
            prop_assert_eq!(bits(&layer.b), bits(&twin.b));
            let error = (twin.scaling() - layer.scaling()).abs();
            prop_assert!(error <= 1e-14 * layer.scaling().abs());
        }
        prop_assert_eq!(read.saved.len(), adapter.saved.len());
        read.write(&two, Profile::Peft).unwrap();
        for file in [WEIGHTS, CONFIG] {
            prop_assert_eq!(fs::read(one.join(file)).unwrap(), fs::read(two.join(file)).unwrap());
        }
    }

    #[test]
    fn the_universal_form_acts_alike_for_every_consumer(layers in layers()) {
        let mut adapter = AdapterWeights { layers, ..AdapterWeights::default() };
        adapter.layers.values_mut().for_each(|layer| layer.bias = None);
        prop_assume!(!is_ambiguous(&adapter));
        let dir = tempfile::tempdir().unwrap();
        adapter.write(dir.path(), Profile::Universal).unwrap();
        for consumer in Consumer::ALL {
            let used = consumer.read(dir.path()).unwrap();
            for (path, layer) in &adapter.layers {
                let (used, meant) = (used[path].delta().unwrap(), layer.delta().unwrap());
                prop_assert!(lora_tests::relative_error(&used, &meant) < 1e-6);
            }
        }
    }

    #[test]
    fn a_sum_minus_one_of_its_terms_is_the_other(layers in layers(), weight in -3.0..3.0f64) {
        prop_assume!(weight.abs() > 0.01);
        let one = AdapterWeights { layers, ..AdapterWeights::default() };
        let mut other = one.clone();
        for layer in other.layers.values_mut() {
            layer.a = layer.a.affine(0.5, 0.25).unwrap();
        }
        let cat = Combination::new(Method::Cat);
        let sum = cat.apply(&[(&one, 1.0), (&other, weight)]).unwrap().adapter;
        let back = Combination::new(Method::Linear).apply(&[(&sum, 1.0), (&one, -1.0)]).unwrap().adapter;
        for site in Difference::between(&back, &other).unwrap().sites {
            let expected = site.second_norm * (weight - 1.0).abs();
            let size = site.first_norm.max(site.second_norm) + one.layers[&site.path].norm().unwrap();
            prop_assert!((site.norm - expected).abs() <= 1e-5 * size, "{site:?}");
        }
    }
}
