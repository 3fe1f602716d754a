//! The derive and the matcher: which layers a model has, under which paths, in which order, and
//! which of them a pattern names.

#[macro_use]
mod support;

mod containers;
mod generics;
mod hygiene;
mod many_names;
mod matcher;
mod messages;
mod names;
mod oracle;
mod pedantic;
mod registry;
mod tree;
