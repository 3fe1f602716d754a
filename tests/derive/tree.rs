//! What the compiler knows of a model against what a traversal of it meets.

use std::collections::BTreeMap;

use lora_core::{LoraTargets, TargetTree, nn::Linear};
use proptest::prelude::*;

use crate::support::{linear, visited};

#[derive(Debug, LoraTargets)]
enum Mlp {
    Dense { up: Linear, down: Linear },
    Experts(Vec<Expert>, #[lora(rename = "router.gate")] Linear),
    None,
}

#[derive(Debug, LoraTargets)]
struct Expert(Linear, Option<Linear>);

#[derive(Debug, LoraTargets)]
struct Block {
    #[lora(rename = "self_attn.qkv")]
    qkv: [Linear; 3],
    #[lora(flatten)]
    mlp: Mlp,
    #[lora(skip)]
    _spare: Linear,
}

#[derive(Debug, LoraTargets)]
struct Model {
    layers: Vec<Option<Box<Block>>>,
    extra: BTreeMap<String, (Linear, Mlp)>,
    #[lora(head)]
    lm_head: Option<Linear>,
}

const TREE: TargetTree = Model::TARGETS;

fn mlps() -> impl Strategy<Value = fn() -> Mlp> {
    prop::sample::select(vec![
        (|| Mlp::Dense {
            up: linear(),
            down: linear(),
        }) as fn() -> Mlp,
        || {
            Mlp::Experts(
                vec![Expert(linear(), None), Expert(linear(), Some(linear()))],
                linear(),
            )
        },
        || Mlp::None,
    ])
}

fn models() -> impl Strategy<Value = Model> {
    let layers = prop::collection::vec(prop::option::of(mlps()), 0..12);
    let extra = prop::collection::btree_map("[a-c]{1,2}(\\.[0-9])?", mlps(), 0..3);
    (layers, extra, any::<bool>()).prop_map(|(layers, extra, head)| Model {
        layers: layers
            .into_iter()
            .map(|layer| {
                layer.map(|mlp| {
                    Box::new(Block {
                        qkv: [linear(), linear(), linear()],
                        mlp: mlp(),
                        _spare: linear(),
                    })
                })
            })
            .collect(),
        extra: extra
            .into_iter()
            .map(|(key, mlp)| (key, (linear(), mlp())))
            .collect(),
        lm_head: head.then(linear),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_visited_path_is_in_the_tree(mut model in models()) {
        for path in visited(&mut model) {
            prop_assert!(TREE.contains(&path), "{}", path);
        }
    }
}

#[test]
fn every_path_of_the_tree_is_visited() {
    let experts = || Mlp::Experts(vec![Expert(linear(), Some(linear()))], linear());
    let dense = || Mlp::Dense {
        up: linear(),
        down: linear(),
    };
    let block = |mlp| {
        Some(Box::new(Block {
            qkv: [linear(), linear(), linear()],
            mlp,
            _spare: linear(),
        }))
    };
    let mut model = Model {
        layers: vec![block(dense()), None, block(experts()), block(Mlp::None)],
        extra: [("x", dense()), ("y", experts())]
            .map(|(key, mlp)| (key.to_string(), (linear(), mlp)))
            .into(),
        lm_head: Some(linear()),
    };
    let seen = visited(&mut model);
    for path in TREE.paths() {
        let matching = lora_core::Glob::new(&path).expect("a short path");
        assert!(seen.iter().any(|seen| matching.matches(seen)), "{path}");
    }
}

#[test]
fn constants_can_ask_the_tree() {
    const {
        assert!(TREE.contains("layers.7.self_attn.qkv.2"));
        assert!(TREE.contains("layers.*.0.3.1"));
        assert!(TREE.contains("*.router.gate"));
        assert!(TREE.contains("extra.any.1.down"));
        assert!(TREE.contains("lm_head"));
        assert!(!TREE.contains("layers.07.up"));
        assert!(!TREE.contains("layers.x.up"));
        assert!(!TREE.contains("layers.1.2.up"));
        assert!(!TREE.contains("*._spare"));
        assert!(!TREE.contains("layers"));
        assert!(!TREE.contains(""));
    };
}
