//! The affine ops on CUDA. The kernels are in `csrc/cuda/affine.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels};
use super::{range, Failure};
use crate::encoding::{minimum_scale, AffineGrid, BlockGeometry};
use crate::kernels::cpu::Compute;
use std::ffi::c_void;

const FILE: &str = "affine.cu";

/// The operations, by their numbers in `csrc/engine.h`.
const OPERATIONS: [&str; 3] = ["Quantize", "Dequantize", "QuantizeDequantize"];

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
#[derive(Clone, Copy)]
struct AffineArgs<C> {
    input: *const c_void,
    grad: *const c_void,
    output: *mut c_void,
    scale: *const C,
    offset: *const C,
    min: *const C,
    max: *const C,
    grad_first: *mut C,
    grad_second: *mut C,
    vectorized: u64,
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
    fn types(&self) -> [&'static str; 3] {
        types(self.operation, self.stored)
    }

    /// Arguments with the encodings set. Ranges of more than one group become scale and offset first; a
    /// single one is derived by each thread for itself, which costs less than a launch.
    ///
    /// # Safety
    /// The encodings are device memory of one element for each group.
    unsafe fn args(&self, launcher: &Launcher<'_>) -> Result<AffineArgs<C>, Failure> {
        let [first, second] = self.encodings;
        let mut args = AffineArgs {
            input: std::ptr::null(),
            grad: std::ptr::null(),
            output: std::ptr::null_mut(),
            scale: first,
            offset: second,
            min: std::ptr::null(),
            max: std::ptr::null(),
            grad_first: std::ptr::null_mut(),
            grad_second: std::ptr::null_mut(),
            vectorized: 0,
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

fn types(operation: usize, stored: Stored) -> [&'static str; 3] {
    [OPERATIONS[operation], stored.name, stored.compute]
}

fn forward_kernel<C>(types: [&'static str; 3]) -> Kernel {
    skeleton::elementwise_kernel::<AffineArgs<C>>(FILE, "AffineForward", types)
}

fn input_gradient_kernel<C>(types: [&'static str; 3]) -> Kernel {
    skeleton::elementwise_kernel::<AffineArgs<C>>(FILE, "AffineBackward", types)
}

fn gradient_kernels<C>(types: [&'static str; 3]) -> ReduceKernels {
    let partial_bytes = 2 * size_of::<f64>() as u64;
    ReduceKernels::new::<AffineArgs<C>>(
        FILE,
        ("AffineBackward", types),
        ("AffineSums", types[2]),
        partial_bytes,
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
    let every = (0..OPERATIONS.len()).flat_map(|operation| {
        Stored::ALL.map(|stored| {
            let types = types(operation, stored);
            if stored.is_double() {
                of::<f64>(types)
            } else {
                of::<f32>(types)
            }
        })
    });
    skeleton::distinct(every.flatten())
}

/// Whether memory begins where a 16-byte access may.
pub fn is_aligned(pointers: &[*const c_void]) -> bool {
    pointers.iter().all(|pointer| pointer.addr() % 16 == 0)
}

/// Quantizes, dequantizes or both.
///
/// # Safety
/// `input` and `output` are device memory of the geometry's size, of the call's dtype; the encodings as in
/// [`Call`].
pub unsafe fn forward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    input: *const c_void,
    output: *mut c_void,
) -> Result<(), Failure> {
    // SAFETY: by the contract.
    unsafe {
        let mut args = call.args(launcher)?;
        (args.input, args.output) = (input, output);
        args.vectorized = u64::from(is_aligned(&[input, output]));
        let kernel = forward_kernel::<C>(call.types());
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
    input: *const c_void,
    grad_input: *mut c_void,
    encodings: [*mut C; 2],
) -> Result<(), Failure> {
    let reduces = encodings.iter().any(|gradient| !gradient.is_null());
    if !reduces && grad_input.is_null() {
        return Ok(());
    }
    // SAFETY: by the contract.
    unsafe {
        let mut args = call.args(launcher)?;
        (args.grad, args.input, args.output) = (grad, input, grad_input);
        [args.grad_first, args.grad_second] = encodings;
        let aligned = is_aligned(&[grad, input, grad_input]);
        args.vectorized = u64::from(aligned);
        if !reduces {
            let kernel = input_gradient_kernel::<C>(call.types());
            return skeleton::elementwise(launcher, &kernel, args, call.geometry, call.stored);
        }
        let width = call.stored.width();
        let plan = ReducePlan::new(call.geometry, width);
        args.vectorized = u64::from(aligned && plan.is_aligned(width));
        skeleton::reduce(launcher, &gradient_kernels::<C>(call.types()), args, plan)
    }
}
