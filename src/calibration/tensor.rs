//! From tensors to slices.

use super::Values;
use crate::encoding::BlockGeometry;
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Calls `body` with the elements of `tensor` in memory order and the geometry of encodings of shape
/// `shape` over it (`block_size` as in [`BlockGeometry::new`]).
///
/// A dense tensor on the CPU is read where it is, in any order of dimensions; others are copied.
///
/// # Errors
/// [`Error::Type`] for a dtype other than float16, bfloat16, float32, float64; [`Error::Value`] if the
/// shapes do not fit; whatever `body` gives.
pub fn with_values<R>(
    tensor: &Tensor,
    shape: &[i64],
    block_size: Option<&[i64]>,
    body: impl FnOnce(Values<'_>, &BlockGeometry) -> Result<R>,
) -> Result<R> {
    let kind = tensor.kind();
    if !matches!(
        kind,
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16
    ) {
        return Err(Error::type_(
            "input",
            "a float16, bfloat16, float32 or float64 tensor",
            format!("{kind:?}"),
        ));
    }
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?;
    let tensor = if is_dense(&tensor.size(), &tensor.stride()) {
        tensor
    } else {
        tensor.f_contiguous()?
    };
    let geometry = BlockGeometry::new(&tensor.size(), &tensor.stride(), shape, block_size)?;
    let len = geometry.numel();
    let data = tensor.data_ptr();
    /// # Safety
    /// `data` points to `len` values of type `T` that live as long as the result.
    unsafe fn slice<'a, T>(data: *const std::ffi::c_void, len: usize) -> &'a [T] {
        if len == 0 {
            return &[];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(data.cast(), len) }
    }
    // SAFETY: a dense CPU tensor holds `numel` values of its dtype from `data_ptr` on; `tensor` lives
    // until the end of this function.
    let values = unsafe {
        match kind {
            Kind::Double => Values::F64(slice(data, len)),
            Kind::Half => Values::F16(slice(data, len)),
            Kind::BFloat16 => Values::Bf16(slice(data, len)),
            _ => Values::F32(slice(data, len)),
        }
    };
    body(values, &geometry)
}

/// Whether the elements fill a stretch of memory without gaps or overlap, in any order of dimensions.
fn is_dense(sizes: &[i64], strides: &[i64]) -> bool {
    let mut dims: Vec<(i64, i64)> = strides
        .iter()
        .copied()
        .zip(sizes.iter().copied())
        .filter(|d| d.1 != 1)
        .collect();
    dims.sort_unstable();
    let mut expected = 1;
    for (stride, size) in dims {
        if stride != expected {
            return size == 0;
        }
        expected *= size;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::HistogramStatistics;
    use super::*;

    #[test]
    fn every_layout_and_dtype_gives_the_same_histogram() {
        let x = Tensor::arange(2 * 3 * 4 * 5, (Kind::Float, Device::Cpu)).reshape([2, 3, 4, 5]);
        let histogram = |x: &Tensor| {
            let s = HistogramStatistics::new(8, None).unwrap();
            with_values(x, &[3, 1, 1], None, |v, g| s.collect(v, g, false)).unwrap()
        };
        let expected = histogram(&x);
        assert_eq!(expected.groups()[1].min(), 20.0);
        let channels_last = x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        let sliced = Tensor::cat(&[&x, &x], 3).narrow(3, 5, 5);
        for other in [
            channels_last,
            sliced,
            x.to_kind(Kind::Double),
            x.to_kind(Kind::Half),
            x.to_kind(Kind::BFloat16),
        ] {
            assert_eq!(histogram(&other), expected, "{:?}", other.stride());
        }
        let ints = x.to_kind(Kind::Int);
        assert!(with_values(&ints, &[], None, |_, _| Ok(())).is_err());
        assert!(with_values(&x, &[7], None, |_, _| Ok(())).is_err());
    }
}
