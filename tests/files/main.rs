//! Adapters apart from any model: their files, hostile ones too, and their arithmetic.

mod archive;
mod combine;
mod consumers;
mod difference;
mod fingerprint;
mod folders;
mod header;
mod inspection;
mod names;
mod pickle;
mod property;
mod settings;
mod shards;
mod support;
mod universal;
