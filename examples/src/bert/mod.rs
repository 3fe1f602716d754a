//! BERT encoders: all-MiniLM-L6-v2, bert-base and their classifiers, from Hugging Face folders.
//!
//! Unlike the decoder of [`crate::model`], an encoder sees a whole batch at once, padded to one
//! length, and attends in both directions.

mod config;
mod model;
mod pretrained;

pub use config::Config;
pub use model::BertForSequenceClassification;
pub use model::BertModel;
pub use pretrained::Bert;
