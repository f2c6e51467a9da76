//! CPU kernels: one always-inlined body each, compiled for AVX-512, AVX2 and the baseline, chosen at
//! run time. Every width computes the same operations in the same order (16 lanes, fixed reduction
//! order), so the results are equal bit for bit whatever the processor and the number of threads.

pub mod adaround;
pub mod affine;
mod element;
pub mod elementwise;
pub mod float;
pub mod grouped_block;
pub mod isa;
mod math;
pub mod min_max;
mod parallel;
mod range;
mod reduce;
pub mod row_combinations;
pub mod seq_mse;
#[cfg(test)]
mod tests;
mod vector;
mod walk;

pub use element::{Compute, Element};
pub use math::Transcendental;
pub use parallel::GRAIN;
pub use range::{range_to_scale_offset, range_to_scale_offset_backward, ScaleOffsetGradients};
