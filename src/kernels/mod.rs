//! Kernels over raw memory. `cpu` computes here; `cuda` compiles `csrc/cuda/*.cu` on first use.
//!
//! Nothing in this module knows tensors: callers (`csrc/`, through [`ffi`]) hand over pointers, a
//! dtype and a [`BlockGeometry`](crate::encoding::BlockGeometry).

pub mod cpu;
pub mod cuda;
pub mod ffi;
