//! Temporary until the lead's lib.rs is merged.
pub mod graph;
