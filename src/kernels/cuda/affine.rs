//! The affine ops on CUDA. The kernels are in `csrc/cuda/affine.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels, Tensors};
use super::{range, Failure};
use crate::encoding::{minimum_scale, AffineGrid, BlockGeometry};
use crate::kernels::cpu::Compute;
use crate::kernels::ffi::for_compute;
use std::ffi::c_void;

const FILE: &str = "affine.cu";

/// The operations and their gradients, by their numbers in `csrc/engine.h`.
const OPERATIONS: [[&str; 2]; 3] = [
    ["Quantize", "QuantizeBackward"],
    ["Dequantize", "DequantizeBackward"],
    ["QuantizeDequantize", "QuantizeDequantizeBackward"],
];

/// A grid's constants in the precision of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Grid<C> {
    qmin: C,
    qmax: C,
    shift: C,
    steps: C,
    minimum_scale: C,
    symmetric_offset: C,
    symmetric: u64,
}

impl<C: Compute> Grid<C> {
    /// For ranges that are symmetric or not.
    pub fn new(grid: &AffineGrid, symmetric: bool) -> Self {
        Self {
            qmin: C::from_f64(grid.qmin() as f64),
            qmax: C::from_f64(grid.qmax() as f64),
            shift: C::from_f64(grid.zero_point_shift()),
            steps: C::from_f64(grid.num_steps() as f64),
            minimum_scale: C::from_f64(minimum_scale(grid.num_steps())),
            symmetric_offset: C::from_f64(grid.symmetric_offset()),
            symmetric: u64::from(symmetric),
        }
    }
}

#[repr(C)]
struct AffineArgs<C> {
    tensors: Tensors<3>,
    scale: *const C,
    offset: *const C,
    min: *const C,
    max: *const C,
    grad_first: *mut C,
    grad_second: *mut C,
    grid: Grid<C>,
}

/// What an affine op is called with, beside its tensors.
pub struct Call<'a, C> {
    /// 0 quantize, 1 dequantize, 2 quantize-dequantize.
    pub operation: usize,
    /// The dtype of the input.
    pub stored: Stored,
    /// Which encoding belongs to which element.
    pub geometry: &'a BlockGeometry,
    /// The integer grid.
    pub grid: &'a AffineGrid,
    /// Scale and offset, or min and max: one for each group, on the device.
    pub encodings: [*const C; 2],
    /// Whether they are min and max, and symmetric or not.
    pub symmetric_range: Option<bool>,
}

impl<C: Compute> Call<'_, C> {
    /// Arguments for these tensors, with the encodings set. Ranges of more than one group become scale and offset first; a
    /// single one is derived by each thread for itself, which costs less than a launch.
    ///
    /// # Safety
    /// The encodings are device memory of one element for each group.
    unsafe fn args(
        &self,
        launcher: &Launcher<'_>,
        tensors: Tensors<3>,
    ) -> Result<AffineArgs<C>, Failure> {
        let [first, second] = self.encodings;
        let mut args = AffineArgs {
            tensors,
            scale: first,
            offset: second,
            min: std::ptr::null(),
            max: std::ptr::null(),
            grad_first: std::ptr::null_mut(),
            grad_second: std::ptr::null_mut(),
            grid: Grid::new(self.grid, self.symmetric_range.unwrap_or(false)),
        };
        if self.symmetric_range.is_none() {
            return Ok(args);
        }
        (args.min, args.max) = (first, second);
        (args.scale, args.offset) = (std::ptr::null(), std::ptr::null());
        let n = self.geometry.num_groups() as u64;
        if n > 1 {
            let scale = launcher.scratch::<C>(2 * n)?;
            let offset = scale.wrapping_add(n as usize);
            // SAFETY: by the contract; the scratch memory holds both.
            unsafe {
                range::to_scale_offset(launcher, args.grid, n, self.encodings, [scale, offset])?;
            }
            (args.scale, args.offset) = (scale, offset);
        }
        Ok(args)
    }
}

fn forward_kernel<C>(operation: usize, stored: Stored) -> Kernel {
    let [forward, _] = OPERATIONS[operation];
    skeleton::map_kernel::<AffineArgs<C>>(FILE, forward, stored)
}

fn input_gradient_kernel<C>(operation: usize, stored: Stored) -> Kernel {
    let [_, backward] = OPERATIONS[operation];
    skeleton::map_kernel::<AffineArgs<C>>(FILE, backward, stored)
}

fn gradient_kernels<C>(operation: usize, stored: Stored) -> ReduceKernels {
    let [_, backward] = OPERATIONS[operation];
    ReduceKernels::of_sums::<AffineArgs<C>>(FILE, backward, stored, ("AffineSums", 2))
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    fn of<C>(operation: usize, stored: Stored) -> Vec<Kernel> {
        let mut kernels = vec![
            forward_kernel::<C>(operation, stored),
            input_gradient_kernel::<C>(operation, stored),
        ];
        kernels.extend(gradient_kernels::<C>(operation, stored).all());
        kernels
    }
    let every = (0..OPERATIONS.len()).flat_map(|operation| {
        Stored::ALL.map(|stored| for_compute!(stored.is_double(), C => of::<C>(operation, stored)))
    });
    skeleton::distinct(every.flatten())
}

/// Quantizes, dequantizes or both.
///
/// # Safety
/// `input` and `output` are device memory of the geometry's size, of the call's dtype; the encodings as in
/// [`Call`].
pub unsafe fn forward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    input: *mut c_void,
    output: *mut c_void,
) -> Result<(), Failure> {
    let tensors = Tensors::new([input, output, std::ptr::null_mut()]);
    let kernel = forward_kernel::<C>(call.operation, call.stored);
    // SAFETY: by the contract.
    unsafe {
        let args = call.args(launcher, tensors)?;
        skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored)
    }
}

/// The gradients of [`forward`]: of the input, and of the encodings as they were given. Null: not wanted.
///
/// # Safety
/// As for [`forward`]; `encodings` are device memory of one element for each group.
pub unsafe fn backward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    grad: *const c_void,
    input: *mut c_void,
    grad_input: *mut c_void,
    encodings: [*mut C; 2],
) -> Result<(), Failure> {
    let data = [grad.cast_mut(), input, grad_input];
    // SAFETY: by the contract.
    unsafe {
        if encodings.iter().any(|gradient| !gradient.is_null()) {
            let width = call.stored.width();
            let plan = ReducePlan::new(call.geometry, width);
            let mut args = call.args(launcher, Tensors::planned(data, &plan, width))?;
            [args.grad_first, args.grad_second] = encodings;
            let kernels = gradient_kernels::<C>(call.operation, call.stored);
            return skeleton::reduce(launcher, &kernels, args, plan);
        }
        if grad_input.is_null() {
            return Ok(());
        }
        let args = call.args(launcher, Tensors::new(data))?;
        let kernel = input_gradient_kernel::<C>(call.operation, call.stored);
        skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored)
    }
}
