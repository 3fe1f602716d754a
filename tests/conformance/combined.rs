//! Weighted combinations, where PEFT's are what their name says.

use candle_core::DType;
use lora_core::adapter::{AdapterWeights, Combination, Method};
use lora_tests::relative_error;

use crate::support::{golden, tensors};

#[test]
fn combinations_change_the_weights_as_in_peft() {
    let expected = tensors("several/combined.safetensors");
    let [one, two] = ["one", "two"]
        .map(|name| AdapterWeights::read(golden("several/combined").join(name)).unwrap());
    for (name, weights, combination) in [
        ("cat", [0.7, -1.25], Combination::new(Method::Cat)),
        ("cat", [0.7, -1.25], Combination::new(Method::Linear)),
        ("svd", [0.7, -1.25], Combination::new(Method::Svd).rank(2)),
        (
            "ties",
            [0.7, 1.25],
            Combination::new(Method::Ties).density(0.5).rank(24),
        ),
        ("one", [1.0, 0.0], Combination::new(Method::Linear)),
    ] {
        let sum = combination.apply(&[(&one, weights[0]), (&two, weights[1])]);
        let sum = sum.unwrap().adapter;
        assert_eq!(sum.layers.len(), 4);
        for (path, layer) in &sum.layers {
            let delta = layer.delta().unwrap().to_dtype(DType::F32).unwrap();
            let error = relative_error(&delta, &expected[&format!("{name}.{path}")]);
            assert!(error < 1e-5, "{combination:?}, {path}: {error}");
        }
    }
}
