//! `#[lora(..)]`, read word by word, with the words' places kept for the errors.

use syn::{
    Attribute, Expr, ExprLit, Ident, Lit, LitStr, Meta, Token,
    ext::IdentExt,
    parse::{Parse, ParseStream},
    punctuated::Punctuated,
};

use crate::{errors::Errors, suggest};

const SKIP: &str = "skip";
const RENAME: &str = "rename";
const HEAD: &str = "head";
const FLATTEN: &str = "flatten";
const CRATE: &str = "crate";

const FIELD_WORDS: &[&str] = &[SKIP, RENAME, HEAD, FLATTEN];
const CONTAINER_WORDS: &[&str] = &[CRATE];

/// What the attributes of a field ask for: the word where it stands.
#[derive(Default)]
pub struct FieldAttrs {
    pub skip: Option<Ident>,
    pub rename: Option<(Ident, LitStr)>,
    pub head: Option<Ident>,
    pub flatten: Option<Ident>,
}

impl FieldAttrs {
    pub fn read(attrs: &[Attribute], errors: &mut Errors) -> Self {
        let mut read = Self::default();
        for Word { word, value } in words(attrs, "a field", FIELD_WORDS, errors) {
            match word.to_string().as_str() {
                SKIP => set_flag(&mut read.skip, word, value, errors),
                HEAD => set_flag(&mut read.head, word, value, errors),
                FLATTEN => set_flag(&mut read.flatten, word, value, errors),
                _ => set_text(&mut read.rename, word, value, errors),
            }
        }
        read
    }
}

/// What the attributes of a struct, enum or union ask for.
#[derive(Default)]
pub struct ContainerAttrs {
    pub krate: Option<(Ident, LitStr)>,
}

impl ContainerAttrs {
    pub fn read(attrs: &[Attribute], place: &str, errors: &mut Errors) -> Self {
        let mut read = Self::default();
        for Word { word, value } in words(attrs, place, CONTAINER_WORDS, errors) {
            set_text(&mut read.krate, word, value, errors);
        }
        read
    }
}

/// Rejects whatever is asked for at a variant, which takes no attribute.
pub fn reject(attrs: &[Attribute], errors: &mut Errors) {
    words(attrs, "a variant", &[], errors);
}

/// One word of an attribute: `skip`, or `rename = "..."`.
struct Word {
    word: Ident,
    value: Option<Expr>,
}

impl Parse for Word {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        Ok(Self {
            word: input.call(Ident::parse_any)?,
            value: match input.parse::<Option<Token![=]>>()? {
                Some(_) => Some(input.parse()?),
                None => None,
            },
        })
    }
}

/// The words of all `#[lora(..)]` that are known and `allowed` here.
fn words(attrs: &[Attribute], place: &str, allowed: &[&str], errors: &mut Errors) -> Vec<Word> {
    let mut words = Vec::new();
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("lora")) {
        let list = match &attr.meta {
            Meta::List(list) if !list.tokens.is_empty() => list,
            other => {
                errors.at(other, "expected words in parentheses: `#[lora(skip)]`");
                continue;
            }
        };
        match list.parse_args_with(Punctuated::<Word, Token![,]>::parse_terminated) {
            Ok(parsed) => words.extend(parsed),
            Err(error) => errors.push(error),
        }
    }
    words.retain(|Word { word, .. }| {
        let name = word.to_string();
        let known = allowed.contains(&name.as_str());
        if !known {
            errors.at(word, explain(&name, place, allowed));
        }
        known
    });
    words
}

/// Says of a word that is not allowed at `place` where it belongs, or what it may have meant.
fn explain(word: &str, place: &str, allowed: &[&str]) -> String {
    if FIELD_WORDS.contains(&word) {
        return format!("`{word}` belongs on a field, not on {place}");
    }
    if CONTAINER_WORDS.contains(&word) {
        return format!("`{word}` belongs on the struct or enum, not on {place}");
    }
    let known = [FIELD_WORDS, CONTAINER_WORDS].concat();
    match suggest::nearest(word, &known) {
        Some(nearest) => format!("unknown word `{word}`; did you mean `{nearest}`?"),
        None if allowed.is_empty() => format!("unknown word `{word}`; {place} takes none"),
        None => {
            let allowed: Vec<_> = allowed.iter().map(|word| format!("`{word}`")).collect();
            format!(
                "unknown word `{word}`; {place} takes {}",
                allowed.join(", ")
            )
        }
    }
}

fn set_flag(slot: &mut Option<Ident>, word: Ident, value: Option<Expr>, errors: &mut Errors) {
    if let Some(value) = value {
        errors.at(value, format!("`{word}` takes no value"));
    }
    if slot.is_some() {
        errors.at(&word, format!("`{word}` is given twice"));
    }
    *slot = Some(word);
}

fn set_text(
    slot: &mut Option<(Ident, LitStr)>,
    word: Ident,
    value: Option<Expr>,
    errors: &mut Errors,
) {
    if slot.is_some() {
        errors.at(&word, format!("`{word}` is given twice"));
    }
    match value {
        Some(Expr::Lit(ExprLit {
            lit: Lit::Str(text),
            ..
        })) => *slot = Some((word, text)),
        Some(other) => errors.at(other, format!("expected a string: `{word} = \"..\"`")),
        None => errors.at(&word, format!("`{word}` needs a value: `{word} = \"..\"`")),
    }
}
