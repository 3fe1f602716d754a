//! The generated code says what it means wherever it is written.

use crate::support::linear;

#[test]
fn the_names_of_the_prelude_may_mean_something_else() {
    #[allow(dead_code, non_camel_case_types, non_snake_case, unused_macros)]
    mod shadowed {
        pub struct Option;
        pub struct Result;
        pub struct Vec;
        pub struct Box;
        pub struct String;
        pub struct Some;
        pub struct Ok;
        pub struct Err;
        pub struct bool;
        pub struct str;
        pub struct usize;
        pub struct Field;
        pub struct TargetTree;
        pub struct ModulePath;
        pub struct Visitor;
        pub struct path;
        pub trait LoraTargets {
            const TARGETS: () = ();
            fn patch_linear(&self) {}
        }
        impl<T> LoraTargets for T {}
        pub mod core {}
        pub mod std {}
        pub mod alloc {}
        pub mod lora_core {}
        macro_rules! concat {
            ($($any:tt)*) => {
                compile_error!("not this one")
            };
        }
        macro_rules! module_path {
            ($($any:tt)*) => {
                compile_error!("not this one")
            };
        }
        macro_rules! panic {
            ($($any:tt)*) => {
                compile_error!("not this one")
            };
        }

        #[derive(::lora_core::LoraTargets)]
        pub struct Model {
            pub path: ::lora_core::nn::Linear,
            pub visitor: ::std::option::Option<::lora_core::nn::Linear>,
            #[lora(skip)]
            pub skipped: Option,
        }

        #[derive(::lora_core::LoraTargets)]
        pub enum Choice {
            Ok(::lora_core::nn::Linear),
            Result {
                field_0: ::lora_core::nn::Linear,
                field_1: ::lora_core::nn::Linear,
            },
            None,
        }

        pub const NAMES: [&::core::primitive::str; 1] = ::lora_core::targets!(Model: ["path"]);
    }

    use shadowed::{Choice, Model, NAMES};
    let mut model = Model {
        path: linear(),
        visitor: Some(linear()),
        skipped: shadowed::Option,
    };
    let _ = &model.skipped;
    assert_visits!(model, ["path", "visitor"]);
    assert_visits!(Choice::Ok(linear()), [""]);
    let (field_0, field_1) = (linear(), linear());
    assert_visits!(Choice::Result { field_0, field_1 }, ["field_0", "field_1"]);
    assert_visits!(Choice::None, []);
    assert_eq!(NAMES, ["path"]);
}

mod facade {
    pub mod lora {
        pub use lora_core::*;
    }
}

#[test]
fn the_crate_may_be_found_elsewhere() {
    use facade::lora::{LoraTargets as Derive, nn::Linear};

    #[derive(Derive)]
    #[lora(crate = "crate::hygiene::facade::lora")]
    struct Model {
        out: Linear,
    }
    assert_visits!(Model { out: linear() }, ["out"]);
    assert_eq!(facade::lora::targets!(Model: ["out"]), ["out"]);
}

#[test]
fn a_macro_may_write_the_model() {
    use lora_core::{LoraTargets, nn::Linear};

    macro_rules! model {
        ($name:ident { $($field:ident: $ty:ty = $segment:literal),* }) => {
            #[derive(LoraTargets)]
            struct $name {
                $(#[lora(rename = $segment)] $field: $ty,)*
                own: Linear,
            }
        };
    }
    model!(Model { a: Linear = "x", b: Option<Linear> = "y.z" });
    macro_rules! checked {
        ($model:ty, $name:literal) => {
            lora_core::targets!($model: [$name])
        };
    }
    assert_eq!(checked!(Model, "y.z"), ["y.z"]);

    let mut model = Model {
        a: linear(),
        b: Some(linear()),
        own: linear(),
    };
    assert_visits!(model, ["x", "y.z", "own"]);
}

#[test]
fn types_of_private_modules_and_of_functions_are_models_too() {
    mod private {
        #[derive(lora_core::LoraTargets)]
        pub(super) struct Inner(lora_core::nn::Linear);

        pub(super) fn inner() -> Inner {
            Inner(crate::support::linear())
        }
    }
    fn local() -> Vec<String> {
        #[derive(lora_core::LoraTargets)]
        struct Model {
            inner: private::Inner,
        }
        crate::support::visited(&mut Model {
            inner: private::inner(),
        })
    }
    assert_eq!(local(), ["inner"]);
}
