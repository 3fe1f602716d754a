//! What the macros expand to, for a few inputs that together use every emitter.

use proc_macro2::TokenStream;
use quote::quote;

use crate::{expand, targets};

fn derive(input: TokenStream) -> String {
    let input = syn::parse2(input).expect("a type");
    expand::derive(&input).to_string()
}

#[test]
fn a_struct_becomes_a_tree_a_traversal_and_an_entry() {
    let expanded = derive(quote! {
        struct Llama {
            #[lora(rename = "model.layers")]
            blocks: Vec<Block>,
            #[lora(skip)]
            rotary: Rotary,
            #[lora(head)]
            r#lm_head: Linear,
            #[lora(flatten)]
            rest: Rest,
        }
    });
    let expected = quote! {
        #[allow(deprecated, unused_qualifications)]
        const _: () = {
            #[automatically_derived]
            #[diagnostic::do_not_recommend]
            impl ::lora_core::LoraTargets for Llama {
                const TARGETS: ::lora_core::TargetTree = ::lora_core::TargetTree::Fields(&[
                    ::lora_core::Field {
                        name: "model.layers",
                        head: false,
                        tree: &<Vec<Block> as ::lora_core::LoraTargets>::TARGETS,
                    },
                    ::lora_core::Field {
                        name: "lm_head",
                        head: true,
                        tree: &<Linear as ::lora_core::LoraTargets>::TARGETS,
                    },
                    ::lora_core::Field {
                        name: "",
                        head: false,
                        tree: &<Rest as ::lora_core::LoraTargets>::TARGETS,
                    }
                ]);
                fn patch_linear(
                    &mut self,
                    __path: &mut ::lora_core::ModulePath,
                    __visitor: &mut dyn ::lora_core::Visitor,
                ) -> ::lora_core::Result<()> {
                    let Self { blocks: __field_0, r#lm_head: __field_2, rest: __field_3, .. } = self;
                    __path.enter(
                        "model.layers",
                        |__path| <Vec<Block> as ::lora_core::LoraTargets>::patch_linear(__field_0, __path, __visitor)
                    )?;
                    __path.enter(
                        "lm_head",
                        |__path| __path.enter_head(
                            |__path| <Linear as ::lora_core::LoraTargets>::patch_linear(__field_2, __path, __visitor)
                        )
                    )?;
                    <Rest as ::lora_core::LoraTargets>::patch_linear(__field_3, __path, __visitor)?;
                    ::core::result::Result::Ok(())
                }
            }
            ::lora_core::__private::inventory::submit! {
                ::lora_core::Registration::new(
                    ::core::concat!(::core::module_path!(), "::", "Llama"),
                    &<Llama as ::lora_core::LoraTargets>::TARGETS,
                )
            }
        };
    };
    assert_eq!(expanded, expected.to_string());
}

#[test]
fn a_generic_enum_is_bound_by_its_fields_and_has_no_entry() {
    let expanded = derive(quote! {
        #[lora(crate = "adapters")]
        enum Mlp<T: Clone, C> where C: Copy {
            Dense(Vec<T>),
            Config(#[lora(skip)] C),
            None,
        }
    });
    let expected = quote! {
        #[allow(deprecated, unused_qualifications)]
        const _: () = {
            #[automatically_derived]
            impl<T: Clone, C> adapters::LoraTargets for Mlp<T, C>
            where
                C: Copy,
                Vec<T>: adapters::LoraTargets
            {
                const TARGETS: adapters::TargetTree = adapters::TargetTree::OneOf(&[
                    adapters::TargetTree::Fields(&[
                        adapters::Field {
                            name: "",
                            head: false,
                            tree: &<Vec<T> as adapters::LoraTargets>::TARGETS,
                        }
                    ]),
                    adapters::TargetTree::Fields(&[]),
                    adapters::TargetTree::Fields(&[])
                ]);
                fn patch_linear(
                    &mut self,
                    __path: &mut adapters::ModulePath,
                    __visitor: &mut dyn adapters::Visitor,
                ) -> adapters::Result<()> {
                    match self {
                        Self::Dense { 0: __field_0, .. } => {
                            <Vec<T> as adapters::LoraTargets>::patch_linear(__field_0, __path, __visitor)?;
                        }
                        Self::Config { .. } => {}
                        Self::None { .. } => {}
                    }
                    ::core::result::Result::Ok(())
                }
            }
        };
    };
    assert_eq!(expanded, expected.to_string());
}

#[test]
fn a_mistake_leaves_a_stand_in() {
    let expanded = derive(quote! {
        struct Model<T>(#[lora(skp)] T);
    });
    let expected = quote! {
        ::core::compile_error! { "unknown word `skp`; did you mean `skip`?" }
        const _: () = {
            #[automatically_derived]
            #[diagnostic::do_not_recommend]
            impl<T> ::lora_core::LoraTargets for Model<T> {
                const TARGETS: ::lora_core::TargetTree =
                    ::lora_core::TargetTree::Keyed(&::lora_core::TargetTree::Linear);

                fn patch_linear(
                    &mut self,
                    _: &mut ::lora_core::ModulePath,
                    _: &mut dyn ::lora_core::Visitor,
                ) -> ::lora_core::Result<()> {
                    ::core::result::Result::Ok(())
                }
            }
        };
    };
    assert_eq!(expanded, expected.to_string());
}

#[test]
fn each_pattern_becomes_a_constant() {
    let expanded = targets::expand(quote!(adapters; Wrapper<models::Block>: ["*.q_proj",]));
    let expected = quote! {{
        #[allow(long_running_const_eval)]
        const _: () = {
            use adapters::__private::check_target;
            check_target(
                &<Wrapper<models::Block> as adapters::LoraTargets>::TARGETS,
                "Wrapper<models::Block>",
                "*.q_proj"
            )
        };
        ["*.q_proj"] as [&'static ::core::primitive::str; _]
    }};
    assert_eq!(expanded.to_string(), expected.to_string());
}
