//! Post-training quantization: what the techniques are made of.

pub mod activation_store;
pub mod adaround;
pub mod linear_map;
pub mod random;
mod rows;
pub mod seq_mse;
