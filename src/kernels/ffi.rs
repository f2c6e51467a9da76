//! The C boundary: what `csrc/` calls. Twin of `csrc/engine.h`.
//!
//! Every function answers a status; the message of a failure is kept per thread for
//! `rimet_last_error`. No panic crosses.

use super::cpu::affine::{self, AffineOp, Encodings};
use super::cpu::{self, elementwise, isa, Compute, Element, ScaleOffsetGradients};
use crate::encoding::{AffineGrid, BlockGeometry};
use crate::error::{Error, Result};
use half::{bf16, f16};
use std::cell::RefCell;
use std::ffi::{c_char, c_void, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

pub(super) mod float;
mod grouped_block;

/// Status codes of the boundary.
const OK: i32 = 0;
const VALUE_ERROR: i32 = 1;
const TYPE_ERROR: i32 = 2;
const RUNTIME_ERROR: i32 = 3;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

pub(super) fn status(body: impl FnOnce() -> Result<()>) -> i32 {
    let (code, message) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return OK,
        Ok(Err(error)) => {
            let code = match error {
                Error::Value { .. } | Error::Json { .. } => VALUE_ERROR,
                Error::Type { .. } => TYPE_ERROR,
                _ => RUNTIME_ERROR,
            };
            (code, error.to_string())
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("unknown");
            (
                RUNTIME_ERROR,
                format!("internal error (please report it): {text}"),
            )
        }
    };
    LAST_ERROR.with(|slot| {
        *slot.borrow_mut() = CString::new(message.replace('\0', " ")).unwrap_or_default()
    });
    code
}

/// The message of this thread's last failure. Valid until its next one.
#[no_mangle]
pub extern "C" fn rimet_last_error() -> *const c_char {
    LAST_ERROR.with(|slot| slot.borrow().as_ptr())
}

/// A dense tensor. `dtype` is a `c10::ScalarType`.
#[repr(C)]
pub struct View {
    pub(super) data: *mut c_void,
    sizes: *const i64,
    strides: *const i64,
    ndim: i64,
    pub(super) dtype: i32,
}

/// How a tensor is quantized. `first` and `second` are contiguous arrays of the compute type: scale and
/// offset, or min and max if `is_range`.
#[repr(C)]
pub struct Affine {
    pub(super) first: *const c_void,
    pub(super) second: *const c_void,
    encoding: *const i64,
    encoding_ndim: i64,
    block: *const i64,
    /// Negative: no block size.
    block_len: i64,
    qmin: i64,
    qmax: i64,
    zero_point_shift: f64,
    pub(super) op: i32,
    pub(super) is_range: i32,
    pub(super) symmetric: i32,
    /// 0: float32, 1: float64.
    pub(super) double_compute: i32,
}

pub(super) const FLOAT16: i32 = 5;
pub(super) const FLOAT32: i32 = 6;
pub(super) const FLOAT64: i32 = 7;
pub(super) const BFLOAT16: i32 = 15;

/// Calls a generic function for the stored type, the compute type and the operation.
macro_rules! for_types {
    ($dtype:expr, $double:expr, $function:ident ( $($argument:expr),* )) => {
        match ($dtype, $double != 0) {
            (FLOAT32, false) => $function::<f32, f32>($($argument),*),
            (FLOAT32, true) => $function::<f32, f64>($($argument),*),
            (FLOAT64, _) => $function::<f64, f64>($($argument),*),
            (FLOAT16, false) => $function::<f16, f32>($($argument),*),
            (FLOAT16, true) => $function::<f16, f64>($($argument),*),
            (BFLOAT16, false) => $function::<bf16, f32>($($argument),*),
            (BFLOAT16, true) => $function::<bf16, f64>($($argument),*),
            (other, _) => Err(Error::type_(
                "input",
                "a tensor of float16, bfloat16, float32 or float64",
                format!("dtype number {other}"),
            )),
        }
    };
}
use for_types;

/// Evaluates an expression with `$c` as the compute type.
macro_rules! for_compute {
    ($double:expr, $c:ident => $body:expr) => {
        if $double {
            type $c = f64;
            $body
        } else {
            type $c = f32;
            $body
        }
    };
}
pub(super) use for_compute;

pub(super) mod ptq;

/// # Safety
/// `p` points to `n` integers, or `n` is 0.
unsafe fn integers<'a>(p: *const i64, n: i64) -> &'a [i64] {
    if n <= 0 {
        &[]
    } else {
        // SAFETY: by the contract.
        unsafe { std::slice::from_raw_parts(p, n as usize) }
    }
}

/// An array that C++ gives, which may be null where it has no elements.
///
/// # Safety
/// `p` points to `n` elements, or `n` is 0.
unsafe fn slice<'a, C>(p: *const c_void, n: usize) -> &'a [C] {
    if n == 0 {
        return &[];
    }
    // SAFETY: by the contract.
    unsafe { std::slice::from_raw_parts(p.cast(), n) }
}

/// As [`slice`], to be written.
///
/// # Safety
/// As for [`slice`], and nothing else reads or writes the elements meanwhile.
unsafe fn slice_mut<'a, C>(p: *mut c_void, n: usize) -> &'a mut [C] {
    if n == 0 {
        return &mut [];
    }
    // SAFETY: by the contract.
    unsafe { std::slice::from_raw_parts_mut(p.cast(), n) }
}

impl View {
    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    unsafe fn geometry(&self, encoding: &[i64], block: Option<&[i64]>) -> Result<BlockGeometry> {
        // SAFETY: by the contract.
        let (sizes, strides) = unsafe {
            (
                integers(self.sizes, self.ndim),
                integers(self.strides, self.ndim),
            )
        };
        BlockGeometry::new(sizes, strides, encoding, block)
    }

    /// The geometry of `min_max`, which needs elements.
    ///
    /// # Safety
    /// As for `geometry`.
    pub(super) unsafe fn min_max_geometry(
        &self,
        encoding: *const i64,
        encoding_ndim: i64,
        block: *const i64,
        block_len: i64,
    ) -> Result<BlockGeometry> {
        // SAFETY: by the contract.
        unsafe {
            let block = (block_len >= 0).then(|| integers(block, block_len));
            let geometry = self.geometry(integers(encoding, encoding_ndim), block)?;
            if geometry.numel() == 0 {
                return Err(Error::value(
                    "input",
                    "at least one element to take a minimum and maximum of",
                    format!(
                        "an empty tensor of shape {:?}",
                        integers(self.sizes, self.ndim)
                    ),
                ));
            }
            Ok(geometry)
        }
    }
}

impl Affine {
    /// The arguments beside the tensors, for a call through the dispatcher. Borrows `block` as a pointer:
    /// it must outlive the call.
    pub(crate) fn plain(
        op: i32,
        grid: Option<&AffineGrid>,
        symmetric_range: Option<bool>,
        block: Option<&[i64]>,
    ) -> Self {
        Self {
            first: std::ptr::null(),
            second: std::ptr::null(),
            encoding: std::ptr::null(),
            encoding_ndim: 0,
            block: block.map_or(std::ptr::null(), <[i64]>::as_ptr),
            block_len: block.map_or(-1, |b| b.len() as i64),
            qmin: grid.map_or(0, AffineGrid::qmin),
            qmax: grid.map_or(1, AffineGrid::qmax),
            zero_point_shift: grid.map_or(0.0, AffineGrid::zero_point_shift),
            op,
            is_range: i32::from(symmetric_range.is_some()),
            symmetric: i32::from(symmetric_range.unwrap_or(false)),
            double_compute: 0,
        }
    }

    /// # Safety
    /// The pointers are as `csrc/engine.h` says.
    pub(super) unsafe fn geometry(&self, input: &View) -> Result<BlockGeometry> {
        // SAFETY: by the contract.
        unsafe {
            let encoding = integers(self.encoding, self.encoding_ndim);
            let block = (self.block_len >= 0).then(|| integers(self.block, self.block_len));
            input.geometry(encoding, block)
        }
    }

    pub(super) fn grid(&self) -> Result<AffineGrid> {
        if self.op == 1 {
            // Dequantize has no grid; any will do.
            return AffineGrid::new(0, 1, 0.0);
        }
        AffineGrid::new(self.qmin, self.qmax, self.zero_point_shift)
    }

    /// Calls `body` with scale and offset, computed first if what was given is a range.
    ///
    /// # Safety
    /// `first` and `second` hold `n` elements of `C`.
    unsafe fn with_encodings<C: Compute, R>(
        &self,
        grid: &AffineGrid,
        n: usize,
        body: impl FnOnce(Encodings<'_, C>) -> R,
    ) -> R {
        // SAFETY: by the contract.
        let (first, second) = unsafe { (slice(self.first, n), slice(self.second, n)) };
        if self.is_range == 0 {
            return body(Encodings {
                scale: first,
                offset: second,
            });
        }
        // One range, the most frequent case, needs no allocation.
        let (mut one_scale, mut one_offset) = ([C::ZERO], [C::ZERO]);
        let (mut scales, mut offsets);
        let (scale, offset): (&mut [C], &mut [C]) = if n == 1 {
            (&mut one_scale, &mut one_offset)
        } else {
            scales = vec![C::ZERO; n];
            offsets = vec![C::ZERO; n];
            (&mut scales, &mut offsets)
        };
        cpu::range_to_scale_offset(first, second, grid, self.symmetric != 0, scale, offset);
        body(Encodings { scale, offset })
    }
}

unsafe fn forward<T: Element<C>, C: Compute>(
    affine: &Affine,
    input: &View,
    output: *mut c_void,
) -> Result<()> {
    let grid = affine.grid()?;
    // SAFETY: by the contract of the callers.
    let geometry = unsafe { affine.geometry(input)? };
    let (x, y) = (input.data.cast::<T>().cast_const(), output.cast::<T>());
    // SAFETY: `input` is dense with `numel` elements, `output` is of the same layout.
    unsafe {
        affine.with_encodings::<C, _>(&grid, geometry.num_groups(), |encodings| match affine.op {
            0 => affine::forward::<affine::Quantize, T, C>(&geometry, encodings, &grid, x, y),
            1 => affine::forward::<affine::Dequantize, T, C>(&geometry, encodings, &grid, x, y),
            _ => affine::forward::<affine::QuantizeDequantize, T, C>(
                &geometry, encodings, &grid, x, y,
            ),
        });
    }
    Ok(())
}

/// Quantize (`op` 0), dequantize (1) or quantize-dequantize (2) `input` into `output`, a tensor of the
/// same dtype and layout, or `input` itself.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_affine_forward(
    affine: *const Affine,
    input: *const View,
    output: *mut c_void,
) -> i32 {
    status(|| {
        // SAFETY: by the contract.
        unsafe {
            let (affine, input) = (&*affine, &*input);
            for_types!(
                input.dtype,
                affine.double_compute,
                forward(affine, input, output)
            )
        }
    })
}

unsafe fn backward<T: Element<C>, C: Compute>(
    affine: &Affine,
    input: &View,
    grad: *const c_void,
    grad_input: *mut c_void,
    grad_first: *mut c_void,
    grad_second: *mut c_void,
) -> Result<()> {
    /// The first `N` gradients of an op's encodings, from the kernel to their places.
    ///
    /// # Safety
    /// As for the caller.
    unsafe fn write<O: AffineOp, T: Element<C>, C: Compute, const N: usize>(
        affine: &Affine,
        input: &View,
        (grad, grad_input): (*const c_void, *mut c_void),
        [first, second]: [*mut C; 2],
    ) -> Result<()> {
        let (grid, symmetric) = (affine.grid()?, affine.symmetric != 0);
        let (g, x) = (grad.cast::<T>(), input.data.cast_const().cast());
        // SAFETY: by the contract; `first`, `second` and the places of their gradients hold one element for
        // each group.
        unsafe {
            let geometry = affine.geometry(input)?;
            let n = geometry.num_groups();
            let sums: Vec<[f64; N]> = affine.with_encodings::<C, _>(&grid, n, |encodings| {
                affine::backward::<O, T, C, N>(&geometry, encodings, &grid, g, x, grad_input.cast())
            });
            if affine.is_range == 0 {
                elementwise::write_sums(&sums, &[first, second]);
            } else {
                let (min, max) = (slice(affine.first, n), slice(affine.second, n));
                let sums = ScaleOffsetGradients::Sums(&sums);
                let places = [first, second];
                cpu::range_to_scale_offset_backward(min, max, &grid, symmetric, sums, places);
            }
        }
        Ok(())
    }
    let (gradients, places) = ((grad, grad_input), [grad_first.cast(), grad_second.cast()]);
    // Symmetric ranges have a constant offset.
    let offset_too = if affine.is_range == 0 {
        !grad_second.is_null()
    } else {
        affine.symmetric == 0
    };
    // SAFETY: handed on.
    unsafe {
        match (affine.op, offset_too) {
            (0, _) => write::<affine::Quantize, T, C, 2>(affine, input, gradients, places),
            (1, _) => write::<affine::Dequantize, T, C, 2>(affine, input, gradients, places),
            (_, true) => {
                write::<affine::QuantizeDequantize, T, C, 2>(affine, input, gradients, places)
            }
            (_, false) => {
                write::<affine::QuantizeDequantize, T, C, 1>(affine, input, gradients, places)
            }
        }
    }
}

/// The gradients of `rimet_affine_forward`. Null pointers stand for gradients that are not wanted.
/// `grad_first` and `grad_second` are arrays of the compute type.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_affine_backward(
    affine: *const Affine,
    input: *const View,
    grad: *const c_void,
    grad_input: *mut c_void,
    grad_first: *mut c_void,
    grad_second: *mut c_void,
) -> i32 {
    status(|| {
        // SAFETY: by the contract.
        unsafe {
            let (affine, input) = (&*affine, &*input);
            for_types!(
                input.dtype,
                affine.double_compute,
                backward(affine, input, grad, grad_input, grad_first, grad_second)
            )
        }
    })
}

/// Checks grid and block geometry without touching data (for the Meta key).
///
/// # Safety
/// As `csrc/engine.h` says; the data pointers are not read.
#[no_mangle]
pub unsafe extern "C" fn rimet_affine_check(affine: *const Affine, input: *const View) -> i32 {
    // SAFETY: by the contract.
    status(|| unsafe {
        (*affine).grid()?;
        (*affine).geometry(&*input).map(drop)
    })
}

/// Scale and offset (arrays of the compute type) of `n` ranges.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_range_to_scale_offset(
    affine: *const Affine,
    n: i64,
    scale: *mut c_void,
    offset: *mut c_void,
) -> i32 {
    // SAFETY: by the contract; every array holds `n` elements.
    status(|| unsafe {
        let (affine, n) = (&*affine, n as usize);
        let (grid, symmetric) = (affine.grid()?, affine.symmetric != 0);
        for_compute!(affine.double_compute != 0, C => {
            let (min, max) = (slice::<C>(affine.first, n), slice(affine.second, n));
            let (scale, offset) = (slice_mut(scale, n), slice_mut(offset, n));
            cpu::range_to_scale_offset(min, max, &grid, symmetric, scale, offset);
        });
        Ok(())
    })
}

/// The gradients of `rimet_range_to_scale_offset`, arrays of the compute type.
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_range_to_scale_offset_backward(
    affine: *const Affine,
    n: i64,
    grad_scale: *const c_void,
    grad_offset: *const c_void,
    grad_min: *mut c_void,
    grad_max: *mut c_void,
) -> i32 {
    // SAFETY: by the contract; every array holds `n` elements.
    status(|| unsafe {
        let (affine, n) = (&*affine, n as usize);
        let (grid, symmetric) = (affine.grid()?, affine.symmetric != 0);
        for_compute!(affine.double_compute != 0, C => {
            let (min, max) = (slice::<C>(affine.first, n), slice(affine.second, n));
            let incoming =
                ScaleOffsetGradients::<C, 2>::Arrays(slice(grad_scale, n), slice(grad_offset, n));
            let outgoing = [grad_min.cast(), grad_max.cast()];
            cpu::range_to_scale_offset_backward(min, max, &grid, symmetric, incoming, outgoing);
        });
        Ok(())
    })
}

/// Smallest and largest element per encoding, as arrays of float32 (float64 for float64 input).
///
/// # Safety
/// As `csrc/engine.h` says.
#[no_mangle]
pub unsafe extern "C" fn rimet_min_max(
    input: *const View,
    encoding: *const i64,
    encoding_ndim: i64,
    block: *const i64,
    block_len: i64,
    min: *mut c_void,
    max: *mut c_void,
) -> i32 {
    unsafe fn write<T: Element<C>, C: Compute>(
        input: &View,
        geometry: &BlockGeometry,
        min: *mut c_void,
        max: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the contract; the outputs hold one element per encoding.
        unsafe {
            let ranges = cpu::min_max::min_max::<T, C>(geometry, input.data.cast::<T>());
            for (i, (low, high)) in ranges.into_iter().enumerate() {
                min.cast::<C>().add(i).write(low);
                max.cast::<C>().add(i).write(high);
            }
        }
        Ok(())
    }
    // SAFETY: by the contract.
    status(|| unsafe {
        let input = &*input;
        let geometry = &input.min_max_geometry(encoding, encoding_ndim, block, block_len)?;
        for_types!(input.dtype, 0, write(input, geometry, min, max))
    })
}

/// The name of the instruction set in use. Static.
#[no_mangle]
pub extern "C" fn rimet_isa() -> *const c_char {
    let name: &CStr = match isa::active() {
        isa::Isa::Portable => c"portable",
        isa::Isa::Avx2 => c"avx2",
        isa::Isa::Avx512 => c"avx512",
    };
    name.as_ptr()
}
