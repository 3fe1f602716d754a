//! Settings for single layers: which layers they reach, what they mean there, what is refused, and
//! the plan that tells before anything is done.

mod config;
mod golden;
mod init;
mod layers;
mod model;
mod patterns;
mod plan;
mod saved;
mod scaling;
mod targets;
