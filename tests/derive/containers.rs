//! Which path segments a container adds, and in which order its parts are visited.

use std::{
    collections::{BTreeMap, HashMap},
    marker::PhantomData,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use lora_core::{LoraTargets, nn::Linear};

use crate::support::{linear, visited};

#[derive(LoraTargets)]
struct Attention {
    q_proj: Linear,
    v_proj: Linear,
}

fn attention() -> Attention {
    Attention {
        q_proj: linear(),
        v_proj: linear(),
    }
}

#[test]
fn a_list_adds_the_index() {
    #[derive(LoraTargets)]
    struct Model {
        vec: Vec<Linear>,
        array: [Linear; 2],
        boxed: Box<[Linear]>,
        nested: Vec<Vec<Attention>>,
    }
    let mut model = Model {
        vec: (0..11).map(|_| linear()).collect(),
        array: [linear(), linear()],
        boxed: Box::new([linear()]),
        nested: vec![vec![], vec![attention()]],
    };
    let mut paths: Vec<_> = (0..11).map(|index| format!("vec.{index}")).collect();
    paths.extend(
        [
            "array.0",
            "array.1",
            "boxed.0",
            "nested.1.0.q_proj",
            "nested.1.0.v_proj",
        ]
        .map(String::from),
    );
    assert_eq!(visited(&mut model), paths);
}

#[test]
fn option_and_box_add_nothing() {
    #[derive(LoraTargets)]
    struct Model {
        some: Option<Linear>,
        none: Option<Linear>,
        boxed: Box<Attention>,
        both: Option<Box<Option<Linear>>>,
    }
    let mut model = Model {
        some: Some(linear()),
        none: None,
        boxed: Box::new(attention()),
        both: Some(Box::new(Some(linear()))),
    };
    assert_visits!(model, ["some", "boxed.q_proj", "boxed.v_proj", "both"]);
    assert_eq!(
        Model::TARGETS.paths(),
        ["some", "none", "boxed.q_proj", "boxed.v_proj", "both"]
    );
}

#[test]
fn a_gap_in_a_list_keeps_its_index() {
    #[derive(LoraTargets)]
    struct Model {
        layers: Vec<Option<Linear>>,
    }
    let mut model = Model {
        layers: vec![None, Some(linear()), None, Some(linear())],
    };
    assert_visits!(model, ["layers.1", "layers.3"]);
}

#[test]
fn a_map_adds_the_key_in_the_order_of_the_keys() {
    #[derive(LoraTargets)]
    struct Model {
        tree: BTreeMap<String, Linear>,
        hash: HashMap<String, Attention>,
    }
    let keys = ["b", "a", "c.d"].map(String::from);
    let mut model = Model {
        tree: keys.clone().map(|key| (key, linear())).into(),
        hash: keys.map(|key| (key, attention())).into(),
    };
    assert_visits!(
        model,
        [
            "tree.a",
            "tree.b",
            "tree.c.d",
            "hash.a.q_proj",
            "hash.a.v_proj",
            "hash.b.q_proj",
            "hash.b.v_proj",
            "hash.c.d.q_proj",
            "hash.c.d.v_proj",
        ],
    );
}

#[test]
fn a_tuple_adds_the_position() {
    #[derive(LoraTargets)]
    struct Model {
        pair: (Linear, Attention),
        one: (Linear,),
    }
    let mut model = Model {
        pair: (linear(), attention()),
        one: (linear(),),
    };
    assert_visits!(model, ["pair.0", "pair.1.q_proj", "pair.1.v_proj", "one.0"]);
}

#[test]
fn a_tuple_struct_adds_the_position_unless_it_is_a_newtype() {
    #[derive(LoraTargets)]
    struct Pair(Linear, Attention);
    #[derive(LoraTargets)]
    struct Newtype(Attention);
    #[derive(LoraTargets)]
    struct OneOfTwo(#[lora(skip)] Arc<Attention>, Linear);
    #[derive(LoraTargets)]
    struct Unit;
    #[derive(LoraTargets)]
    struct Empty {}

    assert_visits!(Pair(linear(), attention()), ["0", "1.q_proj", "1.v_proj"]);
    assert_visits!(Newtype(attention()), ["q_proj", "v_proj"]);
    let mut rest = OneOfTwo(Arc::new(attention()), linear());
    assert_visits!(rest, ["1"]);
    assert_eq!(visited(&mut *Arc::get_mut(&mut rest.0).unwrap()).len(), 2);
    assert_visits!(Unit, []);
    assert_visits!(Empty {}, []);
}

#[test]
fn an_enum_visits_its_active_variant() {
    #[derive(LoraTargets)]
    enum Mlp {
        Dense(Linear),
        Gated { gate: Linear, up: Linear },
        Pair(Linear, #[lora(rename = "second")] Linear),
        Nested(Box<Mlp2>),
        Identity,
    }
    #[derive(LoraTargets)]
    enum Mlp2 {
        Only { down: Linear },
    }
    #[derive(LoraTargets)]
    #[allow(dead_code)]
    enum Never {}

    let (gate, up) = (linear(), linear());
    assert_visits!(Mlp::Dense(linear()), [""]);
    assert_visits!(Mlp::Gated { gate, up }, ["gate", "up"]);
    assert_visits!(Mlp::Pair(linear(), linear()), ["0", "second"]);
    let nested = Mlp2::Only { down: linear() };
    assert_visits!(Mlp::Nested(Box::new(nested)), ["down"]);
    assert_visits!(Mlp::Identity, []);
    assert_eq!(
        Mlp::TARGETS.paths(),
        ["", "gate", "up", "0", "second", "down"]
    );
    assert!(Never::TARGETS.paths().is_empty());
}

#[test]
fn what_holds_no_layer_needs_no_attribute() {
    #[derive(LoraTargets)]
    struct Model<'a> {
        heads: usize,
        eps: f64,
        causal: bool,
        name: String,
        borrowed: &'a str,
        cache: Option<Tensor>,
        masks: HashMap<String, Tensor>,
        device: Device,
        dtype: DType,
        act: candle_nn::Activation,
        dropout: candle_nn::Dropout,
        marker: PhantomData<fn(&'a ())>,
        unit: (),
        out: Linear,
    }
    let name = String::from("model");
    let mut model = Model {
        heads: 1,
        eps: 1e-6,
        causal: true,
        name: name.clone(),
        borrowed: &name,
        cache: None,
        masks: HashMap::new(),
        device: Device::Cpu,
        dtype: DType::F32,
        act: candle_nn::Activation::Silu,
        dropout: candle_nn::Dropout::new(0.1),
        marker: PhantomData,
        unit: (),
        out: linear(),
    };
    assert_visits!(model, ["out"]);
    let _ = (
        model.heads,
        model.eps,
        model.causal,
        &model.name,
        model.borrowed,
        &model.cache,
        &model.masks,
        &model.device,
        model.dtype,
        model.act,
        &model.dropout,
        model.marker,
        model.unit,
    );
}

#[test]
fn every_spelling_of_the_layer_is_the_layer() {
    use lora_core::nn as layers;
    type Alias = Linear;
    #[allow(unused_parens)]
    type Parenthesised = (Linear);

    #[allow(unused_qualifications)]
    #[derive(LoraTargets)]
    struct Model {
        plain: Linear,
        qualified: layers::Linear,
        absolute: ::lora_core::nn::Linear,
        alias: Alias,
        parenthesised: Parenthesised,
        projected: <Vec<Linear> as IntoIterator>::Item,
    }
    let mut model = Model {
        plain: linear(),
        qualified: linear(),
        absolute: linear(),
        alias: linear(),
        parenthesised: linear(),
        projected: linear(),
    };
    assert_visits!(
        model,
        [
            "plain",
            "qualified",
            "absolute",
            "alias",
            "parenthesised",
            "projected"
        ],
    );
}
