//! The ops of floating-point formats on CUDA. The kernels are in `csrc/cuda/float.cu`.

use super::affine::is_aligned;
use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels};
use super::Failure;
use crate::encoding::{BlockGeometry, FloatFormat};
use crate::kernels::cpu::float::Rounding;
use crate::kernels::cpu::Compute;
use std::ffi::c_void;

const FILE: &str = "float.cu";

#[repr(C)]
struct FloatArgs<C> {
    input: *const c_void,
    grad: *const c_void,
    output: *mut c_void,
    scale: *const C,
    grad_scale: *mut C,
    vectorized: u64,
    rounding: Rounding<C>,
}

/// What a float op is called with, beside its tensors.
pub struct Call<'a, C> {
    /// Quantize-dequantize, not quantize alone.
    pub dequantize: bool,
    /// The dtype of the input.
    pub stored: Stored,
    /// Which scale belongs to which element.
    pub geometry: &'a BlockGeometry,
    /// What is rounded to.
    pub format: &'a FloatFormat,
    /// One for each group, on the device.
    pub scale: *const C,
}

impl<C: Compute> Call<'_, C> {
    fn types(&self) -> [&'static str; 3] {
        types(self.dequantize, self.stored)
    }
}

fn types(dequantize: bool, stored: Stored) -> [&'static str; 3] {
    let operation = if dequantize {
        "FloatQuantizeDequantize"
    } else {
        "FloatQuantize"
    };
    [operation, stored.name, stored.compute]
}

fn forward_kernel<C>(types: [&'static str; 3]) -> Kernel {
    skeleton::elementwise_kernel::<FloatArgs<C>>(FILE, "FloatForward", types)
}

fn input_gradient_kernel<C>(types: [&'static str; 3]) -> Kernel {
    skeleton::elementwise_kernel::<FloatArgs<C>>(FILE, "FloatBackward", types)
}

fn gradient_kernels<C>(types: [&'static str; 3]) -> ReduceKernels {
    ReduceKernels::new::<FloatArgs<C>>(
        FILE,
        ("FloatBackward", types),
        ("FloatSums", types[2]),
        size_of::<f64>() as u64,
    )
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    fn of<C>(types: [&'static str; 3]) -> Vec<Kernel> {
        let mut kernels = vec![
            forward_kernel::<C>(types),
            input_gradient_kernel::<C>(types),
        ];
        kernels.extend(gradient_kernels::<C>(types).all());
        kernels
    }
    let every = [false, true].into_iter().flat_map(|dequantize| {
        Stored::ALL.map(|stored| {
            let types = types(dequantize, stored);
            if stored.is_double() {
                of::<f64>(types)
            } else {
                of::<f32>(types)
            }
        })
    });
    skeleton::distinct(every.flatten())
}

/// Rounds to the format.
///
/// # Safety
/// `input` and `output` are device memory of the geometry's size, of the call's dtype; the scales as in
/// [`Call`].
pub unsafe fn forward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    input: *const c_void,
    output: *mut c_void,
) -> Result<(), Failure> {
    let args = FloatArgs {
        input,
        grad: std::ptr::null(),
        output,
        scale: call.scale,
        grad_scale: std::ptr::null_mut(),
        vectorized: u64::from(is_aligned(&[input, output])),
        rounding: Rounding::new(call.format),
    };
    let kernel = forward_kernel::<C>(call.types());
    // SAFETY: by the contract.
    unsafe { skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored) }
}

/// The gradients of [`forward`]: of the input, and of the scales. Null: not wanted.
///
/// # Safety
/// As for [`forward`]; `grad_scale` is device memory of one element for each group.
pub unsafe fn backward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    grad: *const c_void,
    input: *const c_void,
    grad_input: *mut c_void,
    grad_scale: *mut C,
) -> Result<(), Failure> {
    let aligned = is_aligned(&[grad, input, grad_input]);
    let mut args = FloatArgs {
        input,
        grad,
        output: grad_input,
        scale: call.scale,
        grad_scale,
        vectorized: u64::from(aligned),
        rounding: Rounding::new(call.format),
    };
    // SAFETY: by the contract.
    unsafe {
        if !grad_scale.is_null() {
            let width = call.stored.width();
            let plan = ReducePlan::new(call.geometry, width);
            args.vectorized = u64::from(aligned && plan.is_aligned(width));
            return skeleton::reduce(launcher, &gradient_kernels::<C>(call.types()), args, plan);
        }
        if grad_input.is_null() {
            return Ok(());
        }
        let kernel = input_gradient_kernel::<C>(call.types());
        skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored)
    }
}
