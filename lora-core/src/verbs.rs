//! What a model can be told to do with its adapters: the bodies of the methods of
//! [`LoraTargets`](crate::LoraTargets). Each does all of it, or says why not and changes nothing.

mod export;
mod import;
mod merge;
mod roster;
mod status;
mod swap;
mod vars;

pub(crate) use export::export;
pub(crate) use import::{Found, add, import, replace};
pub(crate) use merge::{merge, merge_active, merge_and_unload, merged_tensors, unmerge};
pub(crate) use roster::{adapters, delete, remove_all, rename, set, set_disabled};
pub use status::AdapterStatus;
pub(crate) use status::{report, report_of, status};
pub(crate) use swap::swap;
pub(crate) use vars::{active_vars, vars};
