//! What is wrong with a type although each of its attributes could be read.

use std::collections::HashMap;

use syn::{LitStr, Member};

use crate::{
    ast::{Body, Field, Input},
    errors::Errors,
};

/// Finds all mistakes.
pub fn check(input: &Input, errors: &mut Errors) {
    check_union(input, errors);
    for field in input.fields() {
        check_skip(field, errors);
        check_flatten(field, errors);
        check_rename(field, errors);
    }
    match &input.data {
        Body::Struct(fields) => check_names(fields, errors),
        Body::Enum(variants) => {
            for variant in variants {
                check_names(&variant.fields, errors);
            }
        }
        Body::Union(_) => {}
    }
}

/// Which field of a union is active is not known, so there is nothing to walk over.
fn check_union(input: &Input, errors: &mut Errors) {
    if let Body::Union(span) = input.data {
        errors.push(syn::Error::new(
            span,
            "`LoraTargets` can be derived for structs and enums, not for a union",
        ));
    }
}

/// A skipped field has no path, so that nothing else can be said about it.
fn check_skip(field: &Field, errors: &mut Errors) {
    let attrs = &field.attrs;
    if attrs.skip.is_none() {
        return;
    }
    let others = [
        attrs.rename.as_ref().map(|(word, _)| word),
        attrs.head.as_ref(),
        attrs.flatten.as_ref(),
    ];
    for word in others.into_iter().flatten() {
        errors.at(
            word,
            format!("`{word}` has no effect on a field with `skip`; remove one"),
        );
    }
}

/// A field that adds no segment has no name to change.
fn check_flatten(field: &Field, errors: &mut Errors) {
    if let (Some(_), Some((word, _))) = (&field.attrs.flatten, &field.attrs.rename) {
        errors.at(
            word,
            "`rename` has no effect on a field with `flatten`; remove one",
        );
    }
}

/// A name is one or several segments joined by dots.
fn check_rename(field: &Field, errors: &mut Errors) {
    if let Some((_, name)) = &field.attrs.rename
        && let Err(reason) = check_name(name)
    {
        errors.at(name, reason);
    }
}

fn check_name(name: &LitStr) -> Result<(), String> {
    let value = name.value();
    if value.is_empty() {
        return Err("an empty name; use `flatten` to add no segment".into());
    }
    if value.split('.').any(str::is_empty) {
        return Err(format!(
            "`{value}` has an empty segment: a dot goes between two names"
        ));
    }
    let odd = |c: &char| !(c.is_alphanumeric() || ['_', '-', '.'].contains(c));
    match value.chars().find(odd) {
        Some(odd) => Err(format!(
            "`{value}` has a {odd:?}: a name is made of letters, digits, `_` and `-`"
        )),
        None => Ok(()),
    }
}

/// Two layers at the same path could not be told apart.
fn check_names(fields: &[Field], errors: &mut Errors) {
    let mut taken = HashMap::new();
    for field in fields.iter().filter(|field| field.is_visited()) {
        let segment = field.segment();
        if segment.is_empty() {
            continue;
        }
        let member = match &field.member {
            Member::Named(name) => name.to_string(),
            Member::Unnamed(index) => index.index.to_string(),
        };
        if let Some(other) = taken.get(&segment) {
            let reason = format!("`{segment}` is already the name of the field `{other}`");
            match (&field.attrs.rename, &field.member) {
                (Some((_, name)), _) => errors.at(name, reason),
                (None, Member::Named(name)) => errors.at(name, reason),
                (None, Member::Unnamed(_)) => errors.at(field.ty, reason),
            }
        } else {
            taken.insert(segment, member);
        }
    }
}
