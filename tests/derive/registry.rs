//! Which models a program knows of.

use lora_core::{LoraTargets, nn::Linear, registry};

#[derive(LoraTargets)]
struct Listed {
    out: Linear,
}

#[derive(LoraTargets)]
struct Generic<T> {
    out: T,
}

mod inner {
    #[derive(lora_core::LoraTargets)]
    #[allow(dead_code)]
    pub struct Listed {
        pub other: lora_core::nn::Linear,
    }
}

fn names() -> Vec<&'static str> {
    registry().into_iter().map(|entry| entry.name()).collect()
}

#[test]
fn a_type_is_listed_with_its_module_and_its_layers() {
    let entry = |name| registry().into_iter().find(|entry| entry.name() == name);
    let outer = entry("derive::registry::Listed").expect("an entry");
    assert_eq!(outer.targets(), &Listed::TARGETS);
    let inner = entry("derive::registry::inner::Listed").expect("an entry");
    assert_eq!(inner.targets().paths(), ["other"]);
    let _ = |listed: Listed| listed.out;
}

#[test]
fn the_list_is_sorted() {
    assert!(names().is_sorted());
}

#[test]
fn a_generic_type_is_not_listed() {
    assert_eq!(Generic::<Linear>::TARGETS.paths(), ["out"]);
    assert!(!names().iter().any(|name| name.contains("Generic")));
    let _ = |generic: Generic<Linear>| generic.out;
}
