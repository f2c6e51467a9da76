//! Post-training techniques, each as a function of tensors.

pub mod adaround;
pub mod linear_map;
pub mod random;
mod rows;
pub mod seq_mse;
