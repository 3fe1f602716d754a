//! A stand-in for the implementation that a mistake prevents, so that nothing else turns red.

use proc_macro2::TokenStream;
use quote::quote;

use crate::ast::Input;

/// Expands to an implementation that visits nothing and has a layer of any name.
pub fn derive(input: &Input) -> TokenStream {
    let krate = &input.krate;
    let ident = &input.original.ident;
    let (impl_generics, ty_generics, where_clause) = input.original.generics.split_for_impl();
    quote! {
        #[automatically_derived]
        #[diagnostic::do_not_recommend]
        impl #impl_generics #krate::LoraTargets for #ident #ty_generics #where_clause {
            const TARGETS: #krate::TargetTree =
                #krate::TargetTree::Keyed(&#krate::TargetTree::Linear);

            fn patch_linear(
                &mut self,
                _: &mut #krate::ModulePath,
                _: &mut dyn #krate::Visitor,
            ) -> #krate::Result<()> {
                ::core::result::Result::Ok(())
            }
        }
    }
}
