//! From the checked model of a type to its implementation.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::{
    DeriveInput, Ident, Path, Type, WhereClause,
    ext::IdentExt,
    parse_quote,
    visit::{self, Visit},
};

use crate::{
    ast::{Body, Field, Input, Variant},
    check::check,
    errors::Errors,
    fallback,
};

/// The derive: the implementation, or the mistakes beside a stand-in.
pub fn derive(original: &DeriveInput) -> TokenStream {
    let mut errors = Errors::default();
    let input = Input::read(original, &mut errors);
    check(&input, &mut errors);
    match errors.into_tokens() {
        Some(errors) => {
            let fallback = fallback::derive(&input);
            quote! { #errors const _: () = { #fallback }; }
        }
        None => implementation(&input),
    }
}

// Expands to:
//
//     const _: () = {
//         impl LoraTargets for Attention { const TARGETS: .. = ..; fn patch_linear(..) { .. } }
//         inventory::submit! { .. }
//     };
fn implementation(input: &Input) -> TokenStream {
    let krate = &input.krate;
    let ident = &input.original.ident;
    let (impl_generics, ty_generics, _) = input.original.generics.split_for_impl();
    let where_clause = where_clause(input);
    let tree = tree(input);
    let traversal = traversal(input);
    let registration = registration(input);
    quote! {
        const _: () = {
            #[automatically_derived]
            #[diagnostic::do_not_recommend]
            impl #impl_generics #krate::LoraTargets for #ident #ty_generics #where_clause {
                const TARGETS: #krate::TargetTree = #tree;
                #traversal
            }
            #registration
        };
    }
}

fn tree(input: &Input) -> TokenStream {
    let krate = &input.krate;
    match &input.data {
        Body::Struct(fields) => fields_tree(krate, fields),
        Body::Enum(variants) => {
            let trees = variants
                .iter()
                .map(|variant| fields_tree(krate, &variant.fields));
            quote!(#krate::TargetTree::OneOf(&[#(#trees),*]))
        }
        Body::Union(_) => TokenStream::new(),
    }
}

// Expands to:
//
//     TargetTree::Fields(&[
//         Field { name: "q_proj", head: false, tree: &<Linear as LoraTargets>::TARGETS },
//         ..
//     ])
fn fields_tree(krate: &Path, fields: &[Field]) -> TokenStream {
    let fields = fields
        .iter()
        .filter(|field| field.is_visited())
        .map(|field| {
            let name = field.segment();
            let head = field.attrs.head.is_some();
            let ty = field.ty;
            quote! {
                #krate::Field {
                    name: #name,
                    head: #head,
                    tree: &<#ty as #krate::LoraTargets>::TARGETS,
                }
            }
        });
    quote!(#krate::TargetTree::Fields(&[#(#fields),*]))
}

fn traversal(input: &Input) -> TokenStream {
    let krate = &input.krate;
    let walk = Walk::new(krate);
    let body = match &input.data {
        Body::Struct(fields) => {
            let pattern = walk.pattern(fields);
            let visits = walk.visits(fields);
            quote!(let Self #pattern = self; #visits)
        }
        Body::Enum(variants) if variants.is_empty() => quote!(match *self {}),
        Body::Enum(variants) => {
            let arms = variants.iter().map(|Variant { ident, fields }| {
                let pattern = walk.pattern(fields);
                let visits = walk.visits(fields);
                quote!(Self::#ident #pattern => { #visits })
            });
            quote!(match self { #(#arms)* })
        }
        Body::Union(_) => TokenStream::new(),
    };
    let (path, visitor) = if input.fields().any(Field::is_visited) {
        (&walk.path, &walk.visitor)
    } else {
        let unused = Ident::new("_", Span::call_site());
        return quote! {
            fn patch_linear(
                &mut self,
                #unused: &mut #krate::ModulePath,
                #unused: &mut dyn #krate::Visitor,
            ) -> #krate::Result<()> {
                ::core::result::Result::Ok(())
            }
        };
    };
    quote! {
        fn patch_linear(
            &mut self,
            #path: &mut #krate::ModulePath,
            #visitor: &mut dyn #krate::Visitor,
        ) -> #krate::Result<()> {
            #body
            ::core::result::Result::Ok(())
        }
    }
}

/// The names of the generated method, out of reach for what a macro in a field's type may say.
struct Walk<'a> {
    krate: &'a Path,
    path: Ident,
    visitor: Ident,
}

impl<'a> Walk<'a> {
    fn new(krate: &'a Path) -> Self {
        Self {
            krate,
            path: Ident::new("path", Span::mixed_site()),
            visitor: Ident::new("visitor", Span::mixed_site()),
        }
    }

    fn binding(index: usize) -> Ident {
        format_ident!("field_{index}", span = Span::mixed_site())
    }

    // Expands to: { q_proj: field_0, 1: field_1, .. }
    fn pattern(&self, fields: &[Field]) -> TokenStream {
        let bindings = fields
            .iter()
            .enumerate()
            .filter(|(_, field)| field.is_visited())
            .map(|(index, field)| {
                let member = &field.member;
                let binding = Self::binding(index);
                quote!(#member: #binding,)
            });
        quote!({ #(#bindings)* .. })
    }

    // Expands to, for each field:
    //
    //     path.enter("q_proj", |path| <Linear as LoraTargets>::patch_linear(field_0, path, visitor))?;
    fn visits(&self, fields: &[Field]) -> TokenStream {
        let Self {
            krate,
            path,
            visitor,
        } = self;
        fields
            .iter()
            .enumerate()
            .filter(|(_, field)| field.is_visited())
            .map(|(index, field)| {
                let ty = field.ty;
                let binding = Self::binding(index);
                let mut visit = quote! {
                    <#ty as #krate::LoraTargets>::patch_linear(#binding, #path, #visitor)
                };
                if field.attrs.head.is_some() {
                    visit = quote!(#path.enter_head(|#path| #visit));
                }
                let segment = field.segment();
                if !segment.is_empty() {
                    visit = quote!(#path.enter(#segment, |#path| #visit));
                }
                quote!(#visit?;)
            })
            .collect()
    }
}

// Expands to: where Vec<T>: LoraTargets, .. for the types of fields that mention a parameter.
fn where_clause(input: &Input) -> Option<WhereClause> {
    let krate = &input.krate;
    let mut generics = input.original.generics.clone();
    let params: Vec<Ident> = generics
        .type_params()
        .map(|param| param.ident.clone())
        .collect();
    for field in input.fields().filter(|field| field.is_visited()) {
        if mentions(field.ty, &params) {
            let ty = field.ty;
            generics
                .make_where_clause()
                .predicates
                .push(parse_quote!(#ty: #krate::LoraTargets));
        }
    }
    generics.where_clause
}

fn mentions(ty: &Type, params: &[Ident]) -> bool {
    struct Search<'a> {
        params: &'a [Ident],
        found: bool,
    }

    impl<'ast> Visit<'ast> for Search<'_> {
        fn visit_path(&mut self, path: &'ast Path) {
            self.found |= path.leading_colon.is_none()
                && path
                    .segments
                    .first()
                    .is_some_and(|first| self.params.contains(&first.ident));
            visit::visit_path(self, path);
        }

        // What a macro in a type makes of its tokens can't be seen here.
        fn visit_macro(&mut self, _: &'ast syn::Macro) {
            self.found |= !self.params.is_empty();
        }
    }

    let mut search = Search {
        params,
        found: false,
    };
    search.visit_type(ty);
    search.found
}

// A static can't be generic, so only types without parameters are listed.
fn registration(input: &Input) -> Option<TokenStream> {
    if !input.original.generics.params.is_empty() {
        return None;
    }
    let krate = &input.krate;
    let ident = &input.original.ident;
    let name = ident.unraw().to_string();
    Some(quote! {
        #krate::__private::inventory::submit! {
            #krate::Registration::new(
                ::core::concat!(::core::module_path!(), "::", #name),
                &<#ident as #krate::LoraTargets>::TARGETS,
            )
        }
    })
}
