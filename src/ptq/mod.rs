//! Post-training quantization: what the techniques are made of.

pub mod activation_store;
