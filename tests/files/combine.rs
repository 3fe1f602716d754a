//! Sums and other combinations of adapters.

use candle_core::{DType, Device, Tensor};
use lora_core::{
    BiasMode,
    adapter::{AdapterWeights, Combination, Election, Fingerprint, Method},
};
use lora_tests::{randn, relative_error, to_vec};

use crate::support::*;

const PATH: &str = "model.layers.0.q_proj";

/// An adapter of one layer; `rslora` and `bias` as they come.
fn one(rank: usize, alpha: f64, seed: u32) -> AdapterWeights {
    let mut layer = layer(rank, alpha, seed);
    layer.rslora = seed.is_multiple_of(2);
    layer.bias = seed.is_multiple_of(3).then(|| randn(seed, 4, DType::F32));
    adapter([(PATH, layer)])
}

fn delta(adapter: &AdapterWeights) -> Tensor {
    adapter.layers[PATH].delta().unwrap()
}

fn weighted(adapters: &[(&AdapterWeights, f64)]) -> Tensor {
    let terms = adapters
        .iter()
        .map(|(adapter, weight)| (delta(adapter) * *weight).unwrap());
    terms.reduce(|sum, term| (sum + term).unwrap()).unwrap()
}

/// A one-layer adapter whose delta is the given 2 x 2 matrix.
fn dense(rows: [[f64; 2]; 2]) -> AdapterWeights {
    let b = Tensor::new(&rows, &Device::Cpu).unwrap();
    let a = Tensor::eye(2, DType::F64, &Device::Cpu).unwrap();
    adapter([(
        PATH,
        lora_core::adapter::LayerWeights {
            a,
            b,
            bias: None,
            alpha: 2.0,
            rslora: false,
        },
    )])
}

#[track_caller]
fn assert_delta(how: &Combination, adapters: &[(&AdapterWeights, f64)], expected: [[f64; 2]; 2]) {
    let combined = how.apply(adapters).unwrap().adapter;
    let expected = Tensor::new(&expected, &Device::Cpu).unwrap();
    let got = delta(&combined);
    let error = relative_error(&got, &expected);
    assert!(
        error < 1e-12,
        "{:?} instead of {:?}",
        to_vec(&got),
        to_vec(&expected)
    );
}

#[test]
fn linear_and_cat_are_the_weighted_sum_without_cross_terms() {
    let (x, y, z) = (one(2, 3.0, 1), one(3, 5.0, 2), one(1, 0.5, 3));
    for adapters in [
        vec![(&x, 1.0), (&y, 1.0)],
        vec![(&x, 0.3), (&y, -1.7), (&z, 2.0)],
        vec![(&x, -1.0)],
        vec![(&y, 0.25)],
    ] {
        for method in [Method::Linear, Method::Cat] {
            let combined = Combination::new(method).apply(&adapters).unwrap();
            let error = relative_error(&delta(&combined.adapter), &weighted(&adapters));
            assert!(error < 1e-6, "{method}: {error}");
            assert_eq!(combined.adapter.layers[PATH].scaling(), 1.0);
            assert!((combined.energy[PATH] - 1.0).abs() < 1e-12);
        }
    }
    let cat = Combination::new(Method::Cat)
        .apply(&[(&x, 1.0), (&y, 1.0)])
        .unwrap();
    assert_eq!(cat.adapter.layers[PATH].rank(), 5);
    // 2 + 3 + 2 + 3 directions, but the matrix has four rows.
    let four = [(&x, 1.0), (&y, 1.0), (&x, 2.0), (&y, 2.0)];
    let linear = Combination::new(Method::Linear).apply(&four).unwrap();
    assert_eq!(linear.adapter.layers[PATH].rank(), 4);
}

#[test]
fn one_adapter_with_weight_1_is_itself_whatever_the_method() {
    for seed in 1..=6 {
        let mut adapter = one(3, 4.5, seed);
        adapter.dropout = 0.1;
        for method in [
            "linear",
            "cat",
            "svd",
            "magnitude_prune",
            "ties",
            "dare_linear",
            "dare_ties",
        ] {
            let how = Combination::new(method.parse().unwrap()).density(0.3);
            assert_eq!(how.method.to_string(), method);
            assert_same(&how.apply(&[(&adapter, 1.0)]).unwrap().adapter, &adapter);
        }
    }
}

#[test]
fn biases_are_scaled_and_summed() {
    let (x, y) = (one(2, 3.0, 3), one(2, 5.0, 6));
    let combined = Combination::new(Method::Linear)
        .apply(&[(&x, 2.0), (&y, -1.0)])
        .unwrap();
    let scaled = |adapter: &AdapterWeights| {
        let layer = &adapter.layers[PATH];
        let bias = layer.bias.as_ref().unwrap().to_dtype(DType::F64).unwrap();
        (bias * layer.scaling()).unwrap()
    };
    let expected = ((scaled(&x) * 2.0).unwrap() - scaled(&y)).unwrap();
    assert!(relative_error(&scaled(&combined.adapter), &expected) < 1e-6);
}

#[test]
fn svd_is_the_nearest_matrix_of_its_rank() {
    // Of diag(3, 2) the best of rank 1 is diag(3, 0).
    let (x, y) = (
        dense([[3.0, 0.0], [0.0, 0.0]]),
        dense([[0.0, 0.0], [0.0, 2.0]]),
    );
    let how = Combination::new(Method::Svd).rank(1);
    let combined = how.apply(&[(&x, 1.0), (&y, 1.0)]).unwrap();
    assert_eq!(combined.adapter.layers[PATH].rank(), 1);
    assert!((combined.energy[PATH] - 9.0 / 13.0).abs() < 1e-12);
    assert_delta(&how, &[(&x, 1.0), (&y, 1.0)], [[3.0, 0.0], [0.0, 0.0]]);
    // Without a rank it is the largest of the adapters'.
    let (x, y) = (one(2, 3.0, 1), one(3, 5.0, 2));
    let combined = Combination::new(Method::Svd)
        .apply(&[(&x, 1.0), (&y, 1.0)])
        .unwrap();
    assert_eq!(combined.adapter.layers[PATH].rank(), 3);
    let sum = weighted(&[(&x, 1.0), (&y, 1.0)]);
    let lost = relative_error(&delta(&combined.adapter), &sum).powi(2);
    assert!((1.0 - lost - combined.energy[PATH]).abs() < 1e-6);
}

#[test]
fn a_single_adapter_is_compressed_to_a_rank() {
    let x = one(4, 3.0, 1);
    let how = Combination::new(Method::Linear).rank(2);
    let combined = how.apply(&[(&x, 1.0)]).unwrap();
    assert_eq!(combined.adapter.layers[PATH].rank(), 2);
    assert!(combined.energy[PATH] < 1.0);
}

#[test]
fn magnitude_prune_keeps_the_largest_of_each() {
    let (x, y) = (
        dense([[1.0, -4.0], [2.0, 3.0]]),
        dense([[8.0, 5.0], [-6.0, 7.0]]),
    );
    let how = Combination::new(Method::MagnitudePrune)
        .density(0.5)
        .rank(2);
    assert_delta(&how, &[(&x, 1.0), (&y, -1.0)], [[-8.0, -4.0], [0.0, -4.0]]);
}

#[test]
fn ties_takes_the_mean_of_those_that_agree_with_the_elected_sign() {
    let (x, y, z) = (
        dense([[4.0, 1.0], [-2.0, 5.0]]),
        dense([[-1.0, 3.0], [-4.0, 7.0]]),
        dense([[-2.0, -9.0], [3.0, 3.0]]),
    );
    let all = [(&x, 1.0), (&y, 1.0), (&z, 1.0)];
    let total = Combination::new(Method::Ties).rank(2);
    // Sums 1, -5, -3, 15.
    assert_delta(&total, &all, [[4.0, -9.0], [-3.0, 5.0]]);
    let frequency = total.clone().election(Election::Frequency);
    assert_delta(&frequency, &all, [[-1.5, 2.0], [-3.0, 5.0]]);
    // Two of four elements each: 4 and 5; -4 and 7; -9, and of two threes the first.
    assert_delta(
        &total.clone().density(0.5),
        &all,
        [[4.0, -9.0], [-0.5, 6.0]].map(|row| row.map(|v| if v == -0.5 { -4.0 } else { v })),
    );
    // A negative weight turns the vote.
    let turned = [(&x, 1.0), (&y, -1.0)];
    // Votes: 4 and 1; 1 and -3; -2 and 4; 5 and -7.
    assert_delta(&total, &turned, [[2.5, -3.0], [4.0, -7.0]]);
    // Weights count in the mean.
    assert_delta(&total, &[(&x, 2.0), (&y, 1.0)], [[8.0, 2.5], [-4.0, 8.5]]);
}

#[test]
fn dare_keeps_the_expectation_and_depends_on_its_seed_alone() {
    let x = adapter([(PATH, {
        let mut wide = layer(1, 1.0, 1);
        wide.a = Tensor::ones((1, 64), DType::F64, &Device::Cpu).unwrap();
        wide.b = Tensor::ones((64, 1), DType::F64, &Device::Cpu).unwrap();
        wide
    })]);
    let zero = adapter([(PATH, {
        let mut layer = x.layers[PATH].clone();
        layer.alpha = 0.0;
        layer
    })]);
    let how = Combination::new(Method::DareLinear)
        .density(0.25)
        .rank(64)
        .seed(5);
    let get = |how: &Combination| delta(&how.apply(&[(&x, 1.0), (&zero, 1.0)]).unwrap().adapter);
    let values = to_vec(&get(&how));
    let near = |value: f64, to: f64| (value - to).abs() < 1e-6;
    assert!(values.iter().all(|v| near(*v, 0.0) || near(*v, 4.0)));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    assert!((mean - 1.0).abs() < 0.1, "{mean}");
    assert_eq!(values, to_vec(&get(&how)));
    assert!(relative_error(&get(&how.clone().seed(6)), &get(&how)) > 0.1);
    // The second adapter's elements are others than the first's.
    let sum = delta(&how.apply(&[(&x, 1.0), (&x, 1.0)]).unwrap().adapter);
    assert!(to_vec(&sum).iter().any(|v| near(*v, 4.0)));
}

#[test]
fn sparse_sums_of_large_layers_are_cut_to_the_largest_rank() {
    let big = |seed| {
        let mut layer = layer(3, 6.0, seed);
        layer.a = randn(seed, (3, 90), DType::F32);
        layer.b = randn(seed + 50, (80, 3), DType::F32);
        adapter([(PATH, layer)])
    };
    let (x, y) = (big(1), big(2));
    // Everything is kept: the sum has rank 6, and six are asked for.
    let how = Combination::new(Method::MagnitudePrune).rank(6);
    let combined = how.apply(&[(&x, 1.0), (&y, 0.5)]).unwrap();
    let error = relative_error(
        &delta(&combined.adapter),
        &weighted(&[(&x, 1.0), (&y, 0.5)]),
    );
    assert!(error < 1e-6, "{error}");
    assert!((combined.energy[PATH] - 1.0).abs() < 1e-9);
    let combined = Combination::new(Method::Ties)
        .density(0.5)
        .apply(&[(&x, 1.0), (&y, 0.5)])
        .unwrap();
    assert_eq!(combined.adapter.layers[PATH].rank(), 3);
    assert!((0.1..1.0).contains(&combined.energy[PATH]));
}

#[test]
fn a_layer_that_one_adapter_lacks_is_combined_of_the_others() {
    let x = adapter([("a", layer(2, 3.0, 1)), ("b", layer(2, 3.0, 2))]);
    let y = adapter([("b", layer(2, 3.0, 3)), ("c", layer(2, 3.0, 4))]);
    let sum = Combination::new(Method::Linear)
        .apply(&[(&x, 2.0), (&y, 1.0)])
        .unwrap()
        .adapter;
    assert_eq!(sum.layers.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    let twice = (x.layers["a"].delta().unwrap() * 2.0).unwrap();
    assert!(relative_error(&sum.layers["a"].delta().unwrap(), &twice) < 1e-6);
    assert!(
        relative_error(
            &sum.layers["c"].delta().unwrap(),
            &y.layers["c"].delta().unwrap()
        ) < 1e-6
    );
}

#[test]
fn whole_tensors_are_kept_and_different_ones_refused() {
    let (mut x, mut y) = (one(2, 3.0, 1), one(2, 3.0, 2));
    x.saved
        .insert("head.weight".into(), randn(1, (2, 2), DType::F32));
    x.modules_to_save = vec!["head".into()];
    y.bias = BiasMode::LoraOnly;
    let how = Combination::new(Method::Linear);
    let sum = how.apply(&[(&x, 0.5), (&y, 1.0)]).unwrap().adapter;
    assert_eq!(
        bits(&sum.saved["head.weight"]),
        bits(&x.saved["head.weight"])
    );
    assert_eq!(
        (sum.modules_to_save, sum.bias),
        (vec!["head".into()], BiasMode::LoraOnly)
    );
    y.saved
        .insert("head.weight".into(), randn(1, (2, 2), DType::F32));
    how.apply(&[(&x, 0.5), (&y, 1.0)]).unwrap();
    y.saved
        .insert("head.weight".into(), randn(2, (2, 2), DType::F32));
    let error = how.apply(&[(&x, 0.5), (&y, 1.0)]).unwrap_err().to_string();
    assert_says(&error, &["head.weight", "differs"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (x, y) = (one(2, 3.0, 1), one(2, 3.0, 2));
    let refused = |how: Combination, adapters: &[(&AdapterWeights, f64)], part: &str| {
        assert_says(&how.apply(adapters).unwrap_err().to_string(), &[part]);
    };
    let linear = || Combination::new(Method::Linear);
    refused(linear(), &[], "no adapter");
    refused(linear().rank(0), &[(&x, 1.0)], "rank 0");
    refused(linear(), &[(&x, f64::NAN)], "NaN is no weight");
    for density in [0.0, -1.0, 1.1, f64::NAN] {
        refused(linear().density(density), &[(&x, 1.0)], "density");
    }
    let mut other = y.clone();
    other.layers.get_mut(PATH).unwrap().a = randn(1, (2, 7), DType::F32);
    refused(linear(), &[(&x, 1.0), (&other, 1.0)], "[4, 6] and [4, 7]");
    let print = |seed| Some(Fingerprint::of([("q", &randn(seed, (2, 2), DType::F32))]).unwrap());
    let (mut here, mut there) = (x.clone(), y.clone());
    here.origin.fingerprint = print(1);
    there.origin.fingerprint = print(2);
    refused(linear(), &[(&here, 1.0), (&there, 1.0)], "different bases");
    assert!(
        "median"
            .parse::<Method>()
            .unwrap_err()
            .contains("dare_ties")
    );
}
