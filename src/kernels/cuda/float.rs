//! The ops of floating-point formats on CUDA. The kernels are in `csrc/cuda/float.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels, Tensors};
use super::Failure;
use crate::encoding::{BlockGeometry, FloatFormat};
use crate::kernels::cpu::float::Rounding;
use crate::kernels::cpu::Compute;
use crate::kernels::ffi::for_compute;
use std::ffi::c_void;

const FILE: &str = "float.cu";

/// The operations and their gradients: without and with dequantization.
const OPERATIONS: [[&str; 2]; 2] = [
    ["FloatQuantize", "FloatQuantizeBackward"],
    ["FloatQuantizeDequantize", "FloatQuantizeDequantizeBackward"],
];

#[repr(C)]
struct FloatArgs<C> {
    tensors: Tensors<3>,
    scale: *const C,
    grad_scale: *mut C,
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
    fn args(&self, tensors: Tensors<3>, grad_scale: *mut C) -> FloatArgs<C> {
        FloatArgs {
            tensors,
            scale: self.scale,
            grad_scale,
            rounding: Rounding::new(self.format),
        }
    }
}

fn forward_kernel<C>(dequantize: bool, stored: Stored) -> Kernel {
    let [forward, _] = OPERATIONS[usize::from(dequantize)];
    skeleton::map_kernel::<FloatArgs<C>>(FILE, forward, stored)
}

fn input_gradient_kernel<C>(dequantize: bool, stored: Stored) -> Kernel {
    let [_, backward] = OPERATIONS[usize::from(dequantize)];
    skeleton::map_kernel::<FloatArgs<C>>(FILE, backward, stored)
}

fn gradient_kernels<C>(dequantize: bool, stored: Stored) -> ReduceKernels {
    let [_, backward] = OPERATIONS[usize::from(dequantize)];
    ReduceKernels::of_sums::<FloatArgs<C>>(FILE, backward, stored, ("FloatSums", 1))
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    fn of<C>(dequantize: bool, stored: Stored) -> Vec<Kernel> {
        let mut kernels = vec![
            forward_kernel::<C>(dequantize, stored),
            input_gradient_kernel::<C>(dequantize, stored),
        ];
        kernels.extend(gradient_kernels::<C>(dequantize, stored).all());
        kernels
    }
    let every = [false, true].into_iter().flat_map(|dequantize| {
        Stored::ALL.map(|stored| for_compute!(stored.is_double(), C => of::<C>(dequantize, stored)))
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
    input: *mut c_void,
    output: *mut c_void,
) -> Result<(), Failure> {
    let tensors = Tensors::new([input, output, std::ptr::null_mut()]);
    let args = call.args(tensors, std::ptr::null_mut());
    let kernel = forward_kernel::<C>(call.dequantize, call.stored);
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
    input: *mut c_void,
    grad_input: *mut c_void,
    grad_scale: *mut C,
) -> Result<(), Failure> {
    let data = [grad.cast_mut(), input, grad_input];
    // SAFETY: by the contract.
    unsafe {
        if !grad_scale.is_null() {
            let width = call.stored.width();
            let plan = ReducePlan::new(call.geometry, width);
            let args = call.args(Tensors::planned(data, &plan, width), grad_scale);
            let kernels = gradient_kernels::<C>(call.dequantize, call.stored);
            return skeleton::reduce(launcher, &kernels, args, plan);
        }
        if grad_input.is_null() {
            return Ok(());
        }
        let args = call.args(Tensors::new(data), grad_scale);
        let kernel = input_gradient_kernel::<C>(call.dequantize, call.stored);
        skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored)
    }
}
