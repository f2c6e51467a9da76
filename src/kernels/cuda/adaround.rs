//! AdaRound's ops on CUDA. The kernels are in `csrc/cuda/adaround.cu`.

use super::device::Launcher;
use super::geometry::ReducePlan;
use super::kernel::{Kernel, Stored};
use super::skeleton::{self, ReduceKernels, Tensors};
use super::Failure;
use crate::encoding::{AffineGrid, BlockGeometry};
use crate::kernels::cpu::adaround::{StepSettings, StepTensors};
use crate::kernels::cpu::Compute;
use crate::kernels::ffi::for_compute;
use std::ffi::c_void;

const FILE: &str = "adaround.cu";
const FORWARD: &str = "AdaroundForward";
const BACKWARD: &str = "AdaroundBackward";
const STEP: &str = "AdaroundStep";
const RECONSTRUCTION_GRADIENT: &str = "ReconstructionGradient";
const REGULARIZER: &str = "Regularizer";
const REGULARIZER_BACKWARD: &str = "RegularizerBackward";

#[repr(C)]
struct AdaroundArgs<C> {
    tensors: Tensors<9>,
    scale: *const C,
    offset: *const C,
    qmin: C,
    qmax: C,
    reg_param: C,
    beta: C,
    step_size: C,
    correction: C,
    soft: u64,
    regularized: u64,
}

#[repr(C)]
struct RegularizerArgs<C> {
    tensors: Tensors<2>,
    grad: *const C,
    sum: *mut C,
    beta: C,
}

#[repr(C)]
struct ReconstructionArgs<C> {
    tensors: Tensors<3>,
    factor: C,
    relu: u64,
}

/// What the ops over weights are called with, beside their tensors.
pub struct Call<'a, C> {
    /// The dtype of every tensor.
    pub stored: Stored,
    /// Which encoding belongs to which element.
    pub geometry: &'a BlockGeometry,
    /// The integer grid.
    pub grid: &'a AffineGrid,
    /// Scale and offset: one for each group, on the device.
    pub encodings: [*const C; 2],
}

impl<C: Compute> Call<'_, C> {
    fn args<const N: usize>(&self, tensors: [*mut c_void; N]) -> AdaroundArgs<C> {
        let mut data = [std::ptr::null_mut(); 9];
        data[..N].copy_from_slice(&tensors);
        let [scale, offset] = self.encodings;
        AdaroundArgs {
            tensors: Tensors::new(data),
            scale,
            offset,
            qmin: C::from_f64(self.grid.qmin() as f64),
            qmax: C::from_f64(self.grid.qmax() as f64),
            reg_param: C::ZERO,
            beta: C::ZERO,
            step_size: C::ZERO,
            correction: C::ZERO,
            soft: 1,
            regularized: 0,
        }
    }

    /// # Safety
    /// `args` point to device memory of the geometry's size, of the call's dtype.
    unsafe fn map(
        &self,
        launcher: &Launcher<'_>,
        operation: &'static str,
        args: AdaroundArgs<C>,
    ) -> Result<(), Failure> {
        let kernel = skeleton::map_kernel::<AdaroundArgs<C>>(FILE, operation, self.stored);
        // SAFETY: by the contract.
        unsafe { skeleton::elementwise(launcher, &kernel, args, self.geometry, self.stored) }
    }
}

fn regularizer_kernels<C>(stored: Stored) -> ReduceKernels {
    let sums = ("RegularizerSums", 1);
    ReduceKernels::of_sums::<RegularizerArgs<C>>(FILE, REGULARIZER, stored, sums)
}

fn regularizer_backward_kernel<C>(stored: Stored) -> Kernel {
    skeleton::map_kernel::<RegularizerArgs<C>>(FILE, REGULARIZER_BACKWARD, stored)
}

fn reconstruction_kernel<C>(stored: Stored) -> Kernel {
    skeleton::map_kernel::<ReconstructionArgs<C>>(FILE, RECONSTRUCTION_GRADIENT, stored)
}

/// The kernels of this file.
pub fn kernels() -> Vec<Kernel> {
    fn of<C>(stored: Stored) -> Vec<Kernel> {
        let over_weights = [FORWARD, BACKWARD, STEP]
            .map(|operation| skeleton::map_kernel::<AdaroundArgs<C>>(FILE, operation, stored));
        let mut kernels = vec![
            reconstruction_kernel::<C>(stored),
            regularizer_backward_kernel::<C>(stored),
        ];
        kernels.extend(over_weights);
        kernels.extend(regularizer_kernels::<C>(stored).all());
        kernels
    }
    let every = Stored::ALL.map(|stored| for_compute!(stored.is_double(), C => of::<C>(stored)));
    skeleton::distinct(every.into_iter().flatten())
}

/// The weights `input`, soft-rounded by `alpha`, or rounded up or down if not `soft`.
///
/// # Safety
/// Every pointer is to device memory of the geometry's size, of the call's dtype; the encodings as in
/// [`Call`].
pub unsafe fn forward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    soft: bool,
    input: *mut c_void,
    alpha: *const c_void,
    output: *mut c_void,
) -> Result<(), Failure> {
    let mut args = call.args([input, alpha.cast_mut(), output]);
    args.soft = u64::from(soft);
    // SAFETY: by the contract.
    unsafe { call.map(launcher, FORWARD, args) }
}

/// The gradient of [`forward`] (soft) with respect to `alpha`.
///
/// # Safety
/// As for [`forward`].
pub unsafe fn backward<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    grad: *const c_void,
    input: *mut c_void,
    alpha: *const c_void,
    grad_alpha: *mut c_void,
) -> Result<(), Failure> {
    let args = call.args([grad.cast_mut(), input, alpha.cast_mut(), grad_alpha]);
    // SAFETY: by the contract.
    unsafe { call.map(launcher, BACKWARD, args) }
}

/// One step of the optimization, in one launch.
///
/// # Safety
/// As for [`forward`].
pub unsafe fn step<C: Compute>(
    launcher: &Launcher<'_>,
    call: &Call<'_, C>,
    settings: &StepSettings,
    tensors: &StepTensors<c_void>,
) -> Result<(), Failure> {
    let t = tensors;
    let (alpha, exp_avg, exp_avg_sq) = (t.alpha, t.exp_avg, t.exp_avg_sq);
    let (grad, input) = (t.grad.cast_mut(), t.input.cast_mut());
    let mut args = call.args([
        alpha, exp_avg, exp_avg_sq, grad, input, // read
        alpha, exp_avg, exp_avg_sq, t.output, // written
    ]);
    let (step_size, correction) = settings.adam();
    args.reg_param = C::from_f64(settings.reg_param);
    args.beta = C::from_f64(settings.beta);
    args.step_size = C::from_f64(step_size);
    args.correction = C::from_f64(correction);
    args.regularized = u64::from(settings.reg_param != 0.0);
    // SAFETY: by the contract; an element is read before it is written, by the same thread.
    unsafe { call.map(launcher, STEP, args) }
}

/// A dense tensor of `n` elements under one encoding.
fn all_alike(n: i64) -> Result<BlockGeometry, Failure> {
    Ok(BlockGeometry::new(&[n], &[1], &[], None)?)
}

/// `sum(1 - |2 h(alpha) - 1|^beta)` over `n` elements.
///
/// # Safety
/// `alpha` is device memory of `n` elements of dtype `stored`, `sum` of one.
pub unsafe fn regularizer<C: Compute>(
    launcher: &Launcher<'_>,
    stored: Stored,
    n: i64,
    beta: f64,
    alpha: *const c_void,
    sum: *mut C,
) -> Result<(), Failure> {
    let width = stored.width();
    let plan = ReducePlan::new(&all_alike(n)?, width);
    let args = RegularizerArgs {
        tensors: Tensors::planned([alpha.cast_mut(), std::ptr::null_mut()], &plan, width),
        grad: std::ptr::null(),
        sum,
        beta: C::from_f64(beta),
    };
    // SAFETY: by the contract.
    unsafe { skeleton::reduce(launcher, &regularizer_kernels::<C>(stored), args, plan) }
}

/// The gradient of [`regularizer`], where `grad` comes in.
///
/// # Safety
/// As for [`regularizer`]; `grad` is device memory of one element, `grad_alpha` of `n` of dtype `stored`.
pub unsafe fn regularizer_backward<C: Compute>(
    launcher: &Launcher<'_>,
    stored: Stored,
    n: i64,
    beta: f64,
    grad: *const C,
    [alpha, grad_alpha]: [*mut c_void; 2],
) -> Result<(), Failure> {
    let args = RegularizerArgs {
        tensors: Tensors::new([alpha, grad_alpha]),
        grad,
        sum: std::ptr::null_mut(),
        beta: C::from_f64(beta),
    };
    let kernel = regularizer_backward_kernel::<C>(stored);
    // SAFETY: by the contract.
    unsafe { skeleton::elementwise(launcher, &kernel, args, &all_alike(n)?, stored) }
}

/// The gradient of `factor / 2 * |f(output) - f(target)|^2` with respect to `output`, in its place; `f` is ReLU or
/// nothing.
///
/// # Safety
/// Both are device memory of `n` elements of dtype `stored`.
pub unsafe fn reconstruction_gradient<C: Compute>(
    launcher: &Launcher<'_>,
    stored: Stored,
    n: i64,
    (factor, relu): (f64, bool),
    output: *mut c_void,
    target: *const c_void,
) -> Result<(), Failure> {
    let args = ReconstructionArgs {
        tensors: Tensors::new([output, target.cast_mut(), output]),
        factor: C::from_f64(factor),
        relu: u64::from(relu),
    };
    let kernel = reconstruction_kernel::<C>(stored);
    // SAFETY: by the contract.
    unsafe { skeleton::elementwise(launcher, &kernel, args, &all_alike(n)?, stored) }
}
