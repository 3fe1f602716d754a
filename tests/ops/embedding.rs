//! `Embedding`.

use std::collections::HashMap;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use lora_core::nn::{Embedding, embedding};

use crate::oracle::{assert_close, numbers, random};

#[test]
fn embedding_equals_candles() {
    let table = random(&[7, 3], 1);
    let indexes = Tensor::new(&[[6u32, 0, 1], [2, 2, 5]], &Device::Cpu).unwrap();
    let ours = Embedding::new(table.clone(), 3).forward(&indexes).unwrap();
    let theirs = candle_nn::Embedding::new(table, 3)
        .forward(&indexes)
        .unwrap();
    assert_eq!(ours.dims(), [2, 3, 3]);
    assert_close("rows", &ours, &theirs, 0.0);
}

#[test]
fn a_tracked_table_gets_a_gradient_and_a_frozen_one_does_not() {
    let table = Var::from_tensor(&random(&[4, 2], 1)).unwrap();
    let indexes = Tensor::new(&[1u32, 1, 3], &Device::Cpu).unwrap();
    let embedding = Embedding::new(table.as_tensor().clone(), 2);
    let loss = embedding.forward(&indexes).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    assert_eq!(
        numbers(grads.get(&table).unwrap()),
        [0., 0., 2., 2., 0., 0., 1., 1.]
    );

    let frozen = Embedding::new(table.as_detached_tensor(), 2);
    assert!(!frozen.forward(&indexes).unwrap().track_op());
}

#[test]
fn no_indexes_give_no_rows() {
    let embedding = Embedding::new(random(&[4, 2], 1), 2);
    let none = Tensor::zeros((0, 3), DType::U32, &Device::Cpu).unwrap();
    assert_eq!(embedding.forward(&none).unwrap().dims(), [0, 3, 2]);
}

#[test]
fn the_constructor_remembers_the_prefix() {
    let tensors = HashMap::from([("model.embed_tokens.weight".to_owned(), random(&[4, 2], 1))]);
    let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
    let layer = embedding(4, 2, vb.pp("model.embed_tokens")).unwrap();
    assert_eq!(layer.path(), Some("model.embed_tokens"));
    assert_eq!(layer.hidden_size(), 2);
    assert_eq!(layer.embeddings().dims(), [4, 2]);
}
