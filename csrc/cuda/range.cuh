// From a range (min, max) to scale and offset, and the gradients back. Twin of
// src/kernels/cpu/range.rs.
#pragma once

#include "device.cuh"

namespace rimet {

// A grid's constants in the precision of the kernel. Twin of `Grid` in src/kernels/cuda/affine.rs.
template <class C>
struct Grid {
  C qmin;
  C qmax;
  C shift;
  C steps;
  C minimum_scale;
  C symmetric_offset;
  u64 symmetric;

  __device__ __forceinline__ C scale(C min, C max) const {
    const C raw = (max - min) / steps;
    const C magnitude = raw < C(0) ? -raw : raw;
    return magnitude < minimum_scale ? minimum_scale : magnitude;
  }

  __device__ __forceinline__ C unclamped_offset(C min, C scale) const {
    return round_even(min / scale) - qmin;
  }

  __device__ __forceinline__ C offset(C min, C scale) const {
    return symmetric ? symmetric_offset : limit(unclamped_offset(min, scale), -qmax, -qmin);
  }

  // Gradients of min and max from those of scale and offset, in float64.
  __device__ __forceinline__ void range_gradient(C min, C max, double grad_scale,
                                                 double grad_offset, C& grad_min,
                                                 C& grad_max) const {
    const C rounded_scale = scale(min, max);
    const double s = static_cast<double>(rounded_scale);
    double direct = 0.0;
    if (!symmetric) {
      const C o = unclamped_offset(min, rounded_scale);
      if (o >= -qmax && o <= -qmin) {
        direct = grad_offset / s;
        grad_scale -= grad_offset * static_cast<double>(min) / (s * s);
      }
    }
    const double raw = static_cast<double>((max - min) / steps);
    const double magnitude = raw < 0.0 ? -raw : raw;
    // NaN stays NaN, as a NaN range makes everything.
    const double sign = is_nan(raw) ? raw : raw < 0.0 ? -1.0 : 1.0;
    const double slope =
        magnitude < static_cast<double>(minimum_scale) ? 0.0 : sign / static_cast<double>(steps);
    grad_min = static_cast<C>(direct - grad_scale * slope);
    grad_max = static_cast<C>(grad_scale * slope);
  }
};

}  // namespace rimet
