//! The checkers find what their programs would read wrong.

use lora_core::adapter::{AdapterWeights, Consumer, Profile};
use lora_tests::relative_error;

use crate::support::*;

/// What a consumer makes of an adapter in PEFT's form: right, wrong, or refused.
fn verdict(consumer: Consumer, adapter: &AdapterWeights) -> &'static str {
    let dir = tempfile::tempdir().unwrap();
    adapter.write(dir.path(), Profile::Peft).unwrap();
    match consumer.read(dir.path()) {
        Err(_) => "refused",
        Ok(used) => {
            let right = adapter.layers.iter().all(|(path, layer)| {
                let used = used[path].delta().unwrap();
                relative_error(&used, &layer.delta().unwrap()) < 1e-6
            });
            if right { "right" } else { "wrong" }
        }
    }
}

#[track_caller]
fn verdicts(adapter: &AdapterWeights, expected: [&str; 5]) {
    assert_eq!(
        Consumer::ALL.map(|consumer| verdict(consumer, adapter)),
        expected
    );
}

// In the order of `Consumer::ALL`: PEFT, vLLM, llama.cpp, mistral.rs, NeMo AutoModel.

#[test]
fn all_read_a_plain_adapter_right() {
    verdicts(&plain(), ["right"; 5]);
}

#[test]
fn rslora_is_lost_on_those_that_divide_by_the_rank() {
    let mut adapter = plain();
    adapter
        .layers
        .values_mut()
        .for_each(|layer| layer.rslora = true);
    verdicts(&adapter, ["right", "right", "wrong", "right", "wrong"]);
}

#[test]
fn patterns_of_alpha_are_lost_on_those_that_know_one_alpha() {
    let mut adapter = plain();
    adapter
        .layers
        .get_mut("model.layers.0.q_proj")
        .unwrap()
        .alpha = 7.0;
    verdicts(&adapter, ["right", "wrong", "wrong", "right", "wrong"]);
}

#[test]
fn mixed_ranks_are_lost_on_those_that_know_one_rank() {
    let adapter = adapter([
        ("a.q", layer(2, 4.0, 1)),
        ("b.q", layer(3, 4.0, 2)),
        ("c.q", layer(3, 4.0, 3)),
    ]);
    verdicts(&adapter, ["right", "wrong", "right", "right", "refused"]);
}

#[test]
fn an_alpha_of_zero_is_one_to_llama_cpp() {
    let mut adapter = plain();
    adapter
        .layers
        .values_mut()
        .for_each(|layer| layer.alpha = 0.0);
    verdicts(&adapter, ["right", "right", "wrong", "right", "right"]);
}

#[test]
fn saved_modules_and_biases_are_for_peft_alone() {
    let mut adapter = plain();
    adapter.modules_to_save = vec!["head".into()];
    adapter.saved.insert(
        "head.weight".into(),
        lora_tests::randn(1, (2, 2), candle_core::DType::F32),
    );
    verdicts(
        &adapter,
        ["right", "refused", "refused", "refused", "refused"],
    );
    let mut adapter = plain();
    for layer in adapter.layers.values_mut() {
        layer.bias = Some(lora_tests::randn(1, 4, candle_core::DType::F32));
    }
    verdicts(
        &adapter,
        ["right", "refused", "refused", "refused", "refused"],
    );
}
