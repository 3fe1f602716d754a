//! Type parameters, where-clauses, lifetimes, constants.

use std::{fmt::Debug, marker::PhantomData};

use lora_core::{LoraTargets, TargetTree, nn::Linear, targets};

use crate::support::linear;

#[derive(LoraTargets)]
struct Block {
    proj: Linear,
}

fn block() -> Block {
    Block { proj: linear() }
}

#[test]
fn a_parameter_is_visited_through_its_bound() {
    #[derive(LoraTargets)]
    struct Model<B> {
        layers: Vec<B>,
        last: B,
    }
    let mut model = Model {
        layers: vec![block()],
        last: block(),
    };
    assert_visits!(model, ["layers.0.proj", "last.proj"]);
    assert_eq!(
        targets!(Model<Block>: ["layers.3.proj", "last.*"]),
        ["layers.3.proj", "last.*"]
    );
}

/// Says nothing about LoRA.
#[derive(Clone, Debug, Default)]
struct Opaque;

#[test]
fn a_parameter_of_skipped_fields_needs_no_bound() {
    #[derive(LoraTargets)]
    struct Model<C, M> {
        #[lora(skip)]
        _config: C,
        marker: PhantomData<M>,
        out: Linear,
    }
    let mut model = Model::<_, Opaque> {
        _config: Opaque,
        marker: PhantomData,
        out: linear(),
    };
    let _ = model.marker;
    assert_visits!(model, ["out"]);
}

#[test]
fn bounds_where_clauses_defaults_and_constants_are_kept() {
    #[derive(LoraTargets)]
    struct Model<'a, C: Clone + Debug, B = Block, const N: usize = 2>
    where
        C: Default,
        B: 'a,
    {
        #[lora(skip)]
        _config: &'a C,
        layers: [B; N],
        borrowed: &'a mut Linear,
    }
    let (config, mut borrowed) = (Opaque, linear());
    let mut model: Model<Opaque> = Model {
        _config: &config,
        layers: [block(), block()],
        borrowed: &mut borrowed,
    };
    assert_visits!(model, ["layers.0.proj", "layers.1.proj", "borrowed"]);
}

#[test]
fn an_associated_type_is_bound_itself() {
    trait Family {
        type Layer;
    }
    struct Plain;
    impl Family for Plain {
        type Layer = Block;
    }
    #[derive(LoraTargets)]
    struct Model<F: Family> {
        first: F::Layer,
        rest: Vec<<F as Family>::Layer>,
    }
    let mut model = Model::<Plain> {
        first: block(),
        rest: vec![block()],
    };
    assert_visits!(model, ["first.proj", "rest.0.proj"]);
}

#[test]
fn generic_enums_and_generic_parts() {
    #[derive(LoraTargets)]
    enum Either<A, B> {
        Left(A),
        Right { it: B },
    }
    #[derive(LoraTargets)]
    struct Model<T> {
        either: Either<T, Vec<T>>,
    }
    let mut model = Model {
        either: Either::Left(linear()),
    };
    assert_visits!(model, ["either"]);
    model.either = Either::Right { it: vec![linear()] };
    assert_visits!(model, ["either.it.0"]);
    assert_eq!(Model::<Linear>::TARGETS.paths(), ["either", "either.it.*"]);
}

#[test]
fn a_trait_object_is_visited_by_a_hand_written_impl() {
    struct Layers(Vec<Box<dyn FnMut() -> &'static str>>);
    impl LoraTargets for Layers {
        const TARGETS: TargetTree = TargetTree::Empty;
        fn patch_linear(
            &mut self,
            _: &mut lora_core::ModulePath,
            _: &mut dyn lora_core::Visitor,
        ) -> lora_core::Result<()> {
            self.0.clear();
            Ok(())
        }
    }
    #[derive(LoraTargets)]
    struct Model {
        layers: Layers,
    }
    let mut model = Model {
        layers: Layers(vec![Box::new(|| "layer")]),
    };
    assert_visits!(model, []);
    assert!(model.layers.0.is_empty());
}
