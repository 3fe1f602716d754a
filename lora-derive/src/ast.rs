//! The type as the macro sees it, borrowed from syn so that an error can point at the source.

use proc_macro2::Span;
use syn::{Data, DeriveInput, Ident, Member, Path, Type, ext::IdentExt, parse_quote};

use crate::{
    attr::{self, ContainerAttrs, FieldAttrs},
    errors::Errors,
};

/// A struct or enum.
pub struct Input<'a> {
    pub original: &'a DeriveInput,
    /// Where `lora_core` is.
    pub krate: Path,
    pub data: Body<'a>,
}

/// What the type is made of.
pub enum Body<'a> {
    Struct(Vec<Field<'a>>),
    Enum(Vec<Variant<'a>>),
    /// Nothing this macro can walk over.
    Union(Span),
}

/// A variant of an enum.
pub struct Variant<'a> {
    pub ident: &'a Ident,
    pub fields: Vec<Field<'a>>,
}

/// A field of a struct or of a variant.
pub struct Field<'a> {
    pub member: Member,
    pub ty: &'a Type,
    pub attrs: FieldAttrs,
    /// The only field of a tuple struct or tuple variant.
    pub newtype: bool,
}

impl<'a> Input<'a> {
    /// Reads the type and its attributes.
    pub fn read(original: &'a DeriveInput, errors: &mut Errors) -> Self {
        let place = match &original.data {
            Data::Struct(_) => "a struct",
            Data::Enum(_) => "an enum",
            Data::Union(_) => "a union",
        };
        let attrs = ContainerAttrs::read(&original.attrs, place, errors);
        let krate = match attrs
            .krate
            .map(|(_, path)| path.parse_with(Path::parse_mod_style))
        {
            Some(Ok(path)) => path,
            Some(Err(error)) => {
                errors.push(error);
                parse_quote!(::lora_core)
            }
            None => parse_quote!(::lora_core),
        };
        let data = match &original.data {
            Data::Struct(data) => Body::Struct(read_fields(&data.fields, errors)),
            Data::Enum(data) => Body::Enum(
                data.variants
                    .iter()
                    .map(|variant| {
                        attr::reject(&variant.attrs, errors);
                        Variant {
                            ident: &variant.ident,
                            fields: read_fields(&variant.fields, errors),
                        }
                    })
                    .collect(),
            ),
            Data::Union(data) => Body::Union(data.union_token.span),
        };
        Self {
            original,
            krate,
            data,
        }
    }

    /// All fields, of all variants.
    pub fn fields(&self) -> impl Iterator<Item = &Field<'a>> {
        let (one, many): (&[_], &[_]) = match &self.data {
            Body::Struct(fields) => (fields, &[]),
            Body::Enum(variants) => (&[], variants),
            Body::Union(_) => (&[], &[]),
        };
        one.iter()
            .chain(many.iter().flat_map(|variant| &variant.fields))
    }
}

impl Field<'_> {
    pub fn is_visited(&self) -> bool {
        self.attrs.skip.is_none()
    }

    /// The path segments that the field adds: empty for none.
    pub fn segment(&self) -> String {
        match (&self.attrs.rename, &self.member) {
            _ if self.attrs.flatten.is_some() => String::new(),
            (Some((_, name)), _) => name.value(),
            _ if self.newtype => String::new(),
            (None, Member::Named(name)) => name.unraw().to_string(),
            (None, Member::Unnamed(index)) => index.index.to_string(),
        }
    }
}

fn read_fields<'a>(fields: &'a syn::Fields, errors: &mut Errors) -> Vec<Field<'a>> {
    let newtype = matches!(fields, syn::Fields::Unnamed(fields) if fields.unnamed.len() == 1);
    fields
        .iter()
        .zip(fields.members())
        .map(|(field, member)| Field {
            member,
            ty: &field.ty,
            attrs: FieldAttrs::read(&field.attrs, errors),
            newtype,
        })
        .collect()
}
