//! The C boundary of the CUDA kernels; the functions beside those of [`crate::kernels::ffi`]. Twin of the second
//! half of `csrc/engine.h`.

use super::affine::{self, Grid};
use super::device::Launcher;
use super::kernel::Stored;
use super::{adaround, float, min_max, range, seq_mse, Failure};
use crate::encoding::AffineGrid;
use crate::error::{Error, Result};
use crate::kernels::cpu::Compute;
use crate::kernels::ffi::float::Float;
use crate::kernels::ffi::ptq::{row_sum, AdaroundStep};
use crate::kernels::ffi::{for_compute, status, Affine, View, BFLOAT16, FLOAT16, FLOAT32, FLOAT64};
use std::ffi::c_void;

/// There is no kernel: the caller takes tensor ops. Beside the codes of `kernels::ffi`.
const UNAVAILABLE: i32 = 4;

/// Where a call's tensors are.
#[repr(C)]
pub struct Device {
    /// torch's number of the device; -1 if it is none of CUDA's.
    index: i32,
    stream: *mut c_void,
    /// Gives memory of the device that lives until the work of this call is done, or null.
    allocate: extern "C" fn(owner: *mut c_void, bytes: i64) -> *mut c_void,
    owner: *mut c_void,
}

impl Device {
    fn run(&self, body: impl FnOnce(&Launcher<'_>) -> Result<(), Failure>) -> i32 {
        let mut unavailable = false;
        let code = status(|| {
            let allocate = |bytes| (self.allocate)(self.owner, bytes as i64);
            let launcher = Launcher::new(self.index, self.stream, &allocate);
            match launcher.and_then(|launcher| body(&launcher)) {
                Err(Failure::Error(error)) => Err(error),
                Err(Failure::Unavailable(_)) => {
                    unavailable = true;
                    Ok(())
                }
                Ok(()) => Ok(()),
            }
        });
        if unavailable {
            UNAVAILABLE
        } else {
            code
        }
    }
}

fn stored(dtype: i32) -> Result<Stored> {
    let [f16, bf16, f32, f64] = Stored::ALL;
    match dtype {
        FLOAT16 => Ok(f16),
        BFLOAT16 => Ok(bf16),
        FLOAT32 => Ok(f32),
        FLOAT64 => Ok(f64),
        other => Err(Error::type_(
            "input",
            "a tensor of float16, bfloat16, float32 or float64",
            format!("dtype number {other}"),
        )),
    }
}

impl Affine {
    fn encodings<C>(&self) -> [*const C; 2] {
        [self.first.cast(), self.second.cast()]
    }

    /// Calls `body` with the arguments of an affine op.
    ///
    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    unsafe fn call<C: Compute>(
        &self,
        input: &View,
        stored: Stored,
        body: impl FnOnce(&affine::Call<'_, C>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let grid = self.grid()?;
        // SAFETY: by the contract.
        let geometry = unsafe { self.geometry(input)? };
        body(&affine::Call {
            operation: self.op as usize,
            stored,
            geometry: &geometry,
            grid: &grid,
            encodings: self.encodings(),
            symmetric_range: (self.is_range != 0).then_some(self.symmetric != 0),
        })
    }

    /// Calls `body` with the arguments of an AdaRound op.
    ///
    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    unsafe fn adaround_call<C: Compute>(
        &self,
        input: &View,
        stored: Stored,
        body: impl FnOnce(&adaround::Call<'_, C>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let grid = self.grid()?;
        // SAFETY: by the contract.
        let geometry = unsafe { self.geometry(input)? };
        body(&adaround::Call {
            stored,
            geometry: &geometry,
            grid: &grid,
            encodings: self.encodings(),
        })
    }

    /// The grid with its constants, for the ops on ranges alone.
    fn constants<C: Compute>(&self) -> Result<Grid<C>> {
        let grid: AffineGrid = self.grid()?;
        Ok(Grid::new(&grid, self.symmetric != 0))
    }
}

impl Float {
    /// Calls `body` with the arguments of a float op.
    ///
    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    unsafe fn call<C>(
        &self,
        input: &View,
        stored: Stored,
        body: impl FnOnce(&float::Call<'_, C>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let format = self.format()?;
        // SAFETY: by the contract.
        let geometry = unsafe { self.geometry(input)? };
        body(&float::Call {
            dequantize: self.dequantize != 0,
            stored,
            geometry: &geometry,
            format: &format,
            scale: self.scale.cast(),
        })
    }
}

/// Defines entry points: those of [`crate::kernels::ffi`], with a device in front. Structs come as pointers that
/// are not null. The body is that of an unsafe block, under the contract of `csrc/engine.h`.
macro_rules! entry_points {
    ($(
        $(#[$doc:meta])*
        fn $name:ident($launcher:ident $(, $argument:ident: $type:ty)* $(,)?) $body:block
    )*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As `csrc/engine.h` says.
        #[no_mangle]
        pub unsafe extern "C" fn $name(device: &Device $(, $argument: $type)*) -> i32 {
            // SAFETY: by the contract.
            device.run(|$launcher| unsafe { $body })
        }
    )*};
}

entry_points! {
    /// `rimet_affine_forward` on a CUDA device.
    fn rimet_cuda_affine_forward(launcher, affine: &Affine, input: &View, output: *mut c_void) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => affine.call::<C>(input, stored, |call| {
            affine::forward(launcher, call, input.data, output)
        }))
    }

    /// `rimet_affine_backward` on a CUDA device.
    fn rimet_cuda_affine_backward(
        launcher,
        affine: &Affine,
        input: &View,
        grad: *const c_void,
        grad_input: *mut c_void,
        grad_first: *mut c_void,
        grad_second: *mut c_void,
    ) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => affine.call::<C>(input, stored, |call| {
            let encodings = [grad_first.cast(), grad_second.cast()];
            affine::backward(launcher, call, grad, input.data, grad_input, encodings)
        }))
    }

    /// `rimet_range_to_scale_offset` on a CUDA device.
    fn rimet_cuda_range_to_scale_offset(
        launcher,
        affine: &Affine,
        n: i64,
        scale: *mut c_void,
        offset: *mut c_void,
    ) {
        for_compute!(affine.double_compute != 0, C => {
            let (grid, outputs) = (affine.constants::<C>()?, [scale.cast(), offset.cast()]);
            range::to_scale_offset(launcher, grid, n as u64, affine.encodings(), outputs)
        })
    }

    /// `rimet_range_to_scale_offset_backward` on a CUDA device.
    fn rimet_cuda_range_to_scale_offset_backward(
        launcher,
        affine: &Affine,
        n: i64,
        grad_scale: *const c_void,
        grad_offset: *const c_void,
        grad_min: *mut c_void,
        grad_max: *mut c_void,
    ) {
        for_compute!(affine.double_compute != 0, C => {
            let (grid, ranges) = (affine.constants::<C>()?, affine.encodings());
            let incoming = [grad_scale.cast(), grad_offset.cast()];
            let outputs = [grad_min.cast(), grad_max.cast()];
            range::to_scale_offset_backward(launcher, grid, n as u64, ranges, incoming, outputs)
        })
    }

    /// `rimet_min_max` on a CUDA device.
    fn rimet_cuda_min_max(
        launcher,
        input: &View,
        encoding: *const i64,
        encoding_ndim: i64,
        block: *const i64,
        block_len: i64,
        min: *mut c_void,
        max: *mut c_void,
    ) {
        let geometry = input.min_max_geometry(encoding, encoding_ndim, block, block_len)?;
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => {
            let outputs = [min.cast::<C>(), max.cast()];
            min_max::min_max(launcher, stored, &geometry, input.data, outputs)
        })
    }

    /// `rimet_float_forward` on a CUDA device.
    fn rimet_cuda_float_forward(launcher, float: &Float, input: &View, output: *mut c_void) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => float.call::<C>(input, stored, |call| {
            float::forward(launcher, call, input.data, output)
        }))
    }

    /// `rimet_float_backward` on a CUDA device.
    fn rimet_cuda_float_backward(
        launcher,
        float: &Float,
        input: &View,
        grad: *const c_void,
        grad_input: *mut c_void,
        grad_scale: *mut c_void,
    ) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => float.call::<C>(input, stored, |call| {
            float::backward(launcher, call, grad, input.data, grad_input, grad_scale.cast())
        }))
    }

    /// `rimet_adaround_forward` on a CUDA device.
    fn rimet_cuda_adaround_forward(
        launcher,
        affine: &Affine,
        input: &View,
        alpha: *const c_void,
        soft: i32,
        output: *mut c_void,
    ) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => affine.adaround_call::<C>(input, stored, |call| {
            adaround::forward(launcher, call, soft != 0, input.data, alpha, output)
        }))
    }

    /// `rimet_adaround_backward` on a CUDA device.
    fn rimet_cuda_adaround_backward(
        launcher,
        affine: &Affine,
        input: &View,
        alpha: *const c_void,
        grad: *const c_void,
        grad_alpha: *mut c_void,
    ) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => affine.adaround_call::<C>(input, stored, |call| {
            adaround::backward(launcher, call, grad, input.data, alpha, grad_alpha)
        }))
    }

    /// `rimet_adaround_step` on a CUDA device.
    fn rimet_cuda_adaround_step(launcher, affine: &Affine, input: &View, step: &AdaroundStep) {
        let stored = stored(input.dtype)?;
        for_compute!(stored.is_double(), C => affine.adaround_call::<C>(input, stored, |call| {
            adaround::step(launcher, call, &step.settings(), &step.tensors(input))
        }))
    }

    /// `rimet_adaround_regularizer` on a CUDA device; the result, one element of the compute type, is there.
    fn rimet_cuda_adaround_regularizer(
        launcher,
        alpha: *const c_void,
        dtype: i32,
        n: i64,
        beta: f64,
        result: *mut c_void,
    ) {
        let stored = stored(dtype)?;
        for_compute!(stored.is_double(), C => {
            adaround::regularizer::<C>(launcher, stored, n, beta, alpha, result.cast())
        })
    }

    /// `rimet_adaround_regularizer_backward` on a CUDA device; the incoming gradient, one element of the compute
    /// type, is there.
    fn rimet_cuda_adaround_regularizer_backward(
        launcher,
        alpha: *const c_void,
        dtype: i32,
        n: i64,
        beta: f64,
        grad: *const c_void,
        grad_alpha: *mut c_void,
    ) {
        let (stored, tensors) = (stored(dtype)?, [alpha.cast_mut(), grad_alpha]);
        for_compute!(stored.is_double(), C => {
            adaround::regularizer_backward::<C>(launcher, stored, n, beta, grad.cast(), tensors)
        })
    }

    /// `rimet_reconstruction_gradient` on a CUDA device, all samples in order.
    fn rimet_cuda_reconstruction_gradient(
        launcher,
        output: *mut c_void,
        target: *const c_void,
        dtype: i32,
        n: i64,
        factor: f64,
        relu: i32,
    ) {
        let (stored, settings) = (stored(dtype)?, (factor, relu != 0));
        for_compute!(stored.is_double(), C => {
            adaround::reconstruction_gradient::<C>(launcher, stored, n, settings, output, target)
        })
    }

    /// `rimet_row_sums` on a CUDA device.
    fn rimet_cuda_row_sums(
        launcher,
        kind: i32,
        a: *const c_void,
        b: *const c_void,
        dtype: i32,
        rows: i64,
        columns: i64,
        sums: *mut f64,
    ) {
        let (kind, size) = (row_sum(kind)?, [rows, columns]);
        seq_mse::row_sums(launcher, kind, stored(dtype)?, [a, b], size, sums)
    }
}
