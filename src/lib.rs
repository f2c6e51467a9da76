//! Neural-network quantization and compression over LibTorch.
//!
//! The engine behind the Python package `rimet`, usable without Python from programs written with
//! [`tch`]. Layers, lowest first:
//!
//! - [`error`], [`encoding`]: value types (grids, block geometry).
//! - [`kernels`]: CPU kernels with run-time dispatch over instruction sets, and the C boundary.
//! - [`ops`]: the ops over [`tch::Tensor`], through torch's dispatcher.
//! - [`calibration`]: encoding analyzers.
//! - [`nn`]: quantizers and quantized layers for programs written with [`tch`].
//! - [`calibration`]: encoding analyzers: histograms, percentile, SQNR and MSE searches.
//! - [`graph`]: the model graph as plain data, the quantsim configuration, quantizer placement.
//! - [`ptq`]: post-training quantization techniques.
//! - [`export`]: encodings files.

pub mod calibration;
pub mod encoding;
pub mod error;
pub mod export;
pub mod graph;
pub mod kernels;
pub mod nn;
pub mod ops;
pub mod ptq;

#[cfg(feature = "python")]
mod py;

pub use error::{Error, Result};

extern "C" {
    fn rimet_register_ops() -> *const std::ffi::c_char;
}

/// Registers `torch.ops.rimet.*` with torch's dispatcher, unless another copy of this library has.
/// Loading the shared library does so by itself; a program that links the crate statically may call
/// it, to be sure, as often as it likes. Answers the version of the copy whose ops are in use.
pub fn register_ops() -> &'static str {
    // SAFETY: the function takes nothing and answers a string that lives as long as the process.
    unsafe { std::ffi::CStr::from_ptr(rimet_register_ops()) }
        .to_str()
        .unwrap_or("unknown")
}

/// Runs when the library is loaded, before any code of the host uses it.
#[used]
#[cfg_attr(target_os = "linux", link_section = ".init_array")]
static REGISTER_ON_LOAD: extern "C" fn() = {
    extern "C" fn on_load() {
        register_ops();
    }
    on_load
};
