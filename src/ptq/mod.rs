//! Post-training techniques, each as a function of tensors, and what they are made of.
//!
//! What a technique applies to is found on the graph ([`crate::graph`]); nothing here knows modules. Tensors
//! may be on any device. Arithmetic on parameters is float64 inside and rounded once, to the dtype that came.

pub mod activation_store;
pub mod adaround;
pub mod batch_norm_fold;
pub mod bias_correction;
pub mod cross_layer_equalization;
mod layer_parameters;
pub mod linear_map;
mod matrix_products;
mod pieces;
pub mod random;
mod rows;
pub mod seq_mse;
mod sketch;

pub use layer_parameters::LayerParameters;
