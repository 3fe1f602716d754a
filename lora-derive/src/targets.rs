//! `targets!`: each pattern becomes a constant whose evaluation fails, at the pattern's place, if
//! no linear layer of the model has such a path.

use proc_macro2::TokenStream;
use quote::{ToTokens, quote, quote_spanned};
use syn::{
    Expr, ExprLit, Lit, LitStr, Path, Token, Type, bracketed,
    parse::{Parse, ParseStream},
    punctuated::Punctuated,
    token,
};

use crate::errors::Errors;

const USAGE: &str = "expected a model and its patterns: `targets!(Llama: [\"*.q_proj\"])`";

// Expands to:
//
//     {
//         const _: () = check_target(&<Llama as LoraTargets>::TARGETS, "Llama", "*.q_proj");
//         ["*.q_proj"]
//     }
pub fn expand(input: TokenStream) -> TokenStream {
    let Targets {
        krate,
        model,
        patterns,
        bracket,
    } = match syn::parse2(input) {
        Ok(targets) => targets,
        Err(error) => {
            let error = error.into_compile_error();
            return quote!({ #error [""; 0] });
        }
    };
    let mut errors = Errors::default();
    if patterns.is_empty() {
        errors.push(syn::Error::new(
            bracket,
            "no pattern; to adapt every linear layer, use `match_all_linear`",
        ));
    }
    let patterns: Vec<_> = patterns
        .iter()
        .filter_map(|expr| literal(expr, &mut errors))
        .collect();
    let errors = errors.into_tokens();
    let name = type_name(&model);
    let checks = patterns.iter().map(|pattern| {
        quote_spanned! {pattern.span()=>
            #[allow(long_running_const_eval)]
            const _: () = #krate::__private::check_target(
                &<#model as #krate::LoraTargets>::TARGETS,
                #name,
                #pattern,
            );
        }
    });
    quote!({ #errors #(#checks)* [#(#patterns),*] as [&'static ::core::primitive::str; _] })
}

/// `$crate; Llama: ["*.q_proj", ..]`: `lora_core` puts its own path in front.
struct Targets {
    krate: Path,
    model: Type,
    patterns: Punctuated<Expr, Token![,]>,
    bracket: proc_macro2::Span,
}

impl Parse for Targets {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let krate = input.call(Path::parse_mod_style)?;
        input.parse::<Token![;]>()?;
        let usage = |error: syn::Error| syn::Error::new(error.span(), USAGE);
        let model = input.parse().map_err(usage)?;
        input.parse::<Token![:]>().map_err(usage)?;
        if !input.peek(token::Bracket) {
            return Err(input.error(USAGE));
        }
        let list;
        let bracket = bracketed!(list in input);
        let patterns = list.parse_terminated(Expr::parse, Token![,])?;
        input.parse::<Option<Token![,]>>()?;
        if !input.is_empty() {
            return Err(input.error(USAGE));
        }
        Ok(Self {
            krate,
            model,
            patterns,
            bracket: bracket.span.join(),
        })
    }
}

fn literal<'a>(expr: &'a Expr, errors: &mut Errors) -> Option<&'a LitStr> {
    let Expr::Lit(ExprLit {
        lit: Lit::Str(pattern),
        ..
    }) = expr
    else {
        errors.at(
            expr,
            "only a string literal can be checked here; give other patterns to `PeftConfig` \
             directly, which checks them when the program runs",
        );
        return None;
    };
    if pattern.value().starts_with("re:") {
        errors.at(
            pattern,
            "a regular expression is checked when the program runs; give it to `PeftConfig` directly",
        );
        return None;
    }
    Some(pattern)
}

/// The type as a person would write it.
fn type_name(model: &Type) -> String {
    model
        .to_token_stream()
        .to_string()
        .replace(" :: ", "::")
        .replace(" < ", "<")
        .replace("< ", "<")
        .replace(" >", ">")
        .replace(" ,", ",")
}
