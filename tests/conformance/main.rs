//! Conformance: everything here is compared with what the released PEFT wrote and computed; see
//! `tests/golden/README.md`. The table in `tests/README.md` says which behaviour is tested where.

mod base;
mod combined;
mod folders;
mod plan;
mod settings;
mod several;
mod support;
