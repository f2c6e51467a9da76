//! CUDA kernels: compiled from `csrc/cuda` by NVRTC on first use, launched on torch's current stream.
//!
//! Neither libcuda nor NVRTC is linked: both are opened when the first CUDA tensor comes along, so the
//! same library runs where neither is. Where a kernel cannot be had the answer is
//! [`Failure::Unavailable`], and `csrc/` takes plain tensor ops instead.
//!
//! - [`kernel`]: which instances of the templates in `csrc/cuda` there are, and their source text.
//! - `nvrtc`, `cache`: from source text to machine code, once per architecture.
//! - `driver`, `device`: loading and launching.
//! - [`geometry`]: block geometry as kernels take it; how a reduction is cut into units of work.
//! - `adaround`, `affine`, `float`, `min_max`, `range`, `seq_mse`: one file for each `.cu` file, with the
//!   arguments' twins; `skeleton`: what they share.
//!
//! Nothing here waits for the device or allocates on it (scratch memory comes from torch), so after one
//! warm-up call has compiled what it needs, an op can be captured into a CUDA graph.

mod adaround;
mod affine;
mod cache;
mod device;
mod driver;
mod ffi;
mod float;
pub mod geometry;
pub mod kernel;
mod min_max;
mod nvrtc;
mod range;
mod seq_mse;
mod skeleton;

pub use device::{status, Status};
pub use kernel::Kernel;
pub use nvrtc::compile;

use crate::error::Error;

/// Why a kernel did not run.
#[derive(Debug)]
pub enum Failure {
    /// There is no such kernel here, for this reason; tensor ops can do the same.
    Unavailable(String),
    /// The caller's mistake, or the device's.
    Error(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

/// Every kernel there is.
pub fn kernels() -> Vec<Kernel> {
    let files = [
        adaround::kernels(),
        affine::kernels(),
        float::kernels(),
        min_max::kernels(),
        range::kernels(),
        seq_mse::kernels(),
    ];
    files.concat()
}
