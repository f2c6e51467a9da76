// Affine quantize, dequantize and quantize-dequantize, forward and backward, one pass each. The
// formulas are those of docs/numerics.md; twin of src/kernels/cpu/affine.rs, operation by
// operation.

#include "functor.cuh"
#include "range.cuh"

namespace rimet {

template <class C>
struct AffineEncoding {
  C scale;
  C offset;
};

// Twin of `AffineArgs` in src/kernels/cuda/affine.rs.
template <class C>
struct AffineArgs {
  using Encoding = AffineEncoding<C>;
  static constexpr u32 kSums = 2;

  Tensors<3> tensors;
  const C* scale;  // null: derived from min and max, where there is one of each
  const C* offset;
  const C* min;  // null: not a range
  const C* max;
  C* grad_first;   // of scale or min; may be null
  C* grad_second;  // of offset or max; may be null
  Grid<C> grid;

  __device__ __forceinline__ Encoding encoding(u64 group) const {
    return {scale[group], offset[group]};
  }
  __device__ __forceinline__ Encoding sole_encoding() const {
    if (scale) {
      return encoding(0);
    }
    const C derived = grid.scale(*min, *max);
    return {derived, grid.offset(*min, derived)};
  }
  // From the sums of the gradients of scale and offset: those, or the gradients of min and max.
  __device__ __forceinline__ void finish(u64 group, const double (&sums)[2]) const {
    C first = static_cast<C>(sums[0]);
    C second = static_cast<C>(sums[1]);
    if (min) {
      grid.range_gradient(min[group], max[group], sums[0], sums[1], first, second);
    }
    if (grad_first) {
      grad_first[group] = first;
    }
    if (grad_second) {
      grad_second[group] = second;
    }
  }
};

template <class C>
using AffineSums = Sums<AffineArgs<C>>;

// ---- the operations, and their straight-through gradients
// -----------------------------------------------------

template <class C>
struct AffineForward {
  using Args = AffineArgs<C>;
  static constexpr u32 kInputs = 1;  // x
  static constexpr u32 kOutputs = 1;
};

// The gradient of x; summed, those of scale and offset.
template <class C>
struct AffineBackward {
  using Args = AffineArgs<C>;
  static constexpr u32 kInputs = 2;  // the incoming gradient, x
  static constexpr u32 kOutputs = 1;
};

template <class C>
struct Quantize : AffineForward<C> {
  static __device__ __forceinline__ void apply(C (&v)[1], const AffineEncoding<C>& e,
                                               const AffineArgs<C>& args) {
    v[0] = limit(round_even(v[0] / e.scale) - e.offset, args.grid.qmin, args.grid.qmax);
  }
};

template <class C>
struct QuantizeBackward : AffineBackward<C> {
  static __device__ __forceinline__ Terms<C, 2> apply(C (&v)[2], const AffineEncoding<C>& e,
                                                      const AffineArgs<C>& args) {
    const C t = v[1] / e.scale;
    const C q = round_even(t) - e.offset;
    const bool inside = q >= args.grid.qmin && q <= args.grid.qmax;
    const C g = inside ? v[0] : C(0);
    v[0] = g / e.scale;
    // Outside the grid the terms are exact zeros, not 0 * inf.
    return {{inside ? -(v[0] * t) : C(0), -g}};
  }
};

template <class C>
struct Dequantize : AffineForward<C> {
  static __device__ __forceinline__ void apply(C (&v)[1], const AffineEncoding<C>& e,
                                               const AffineArgs<C>&) {
    v[0] = (v[0] + e.offset) * e.scale;
  }
};

template <class C>
struct DequantizeBackward : AffineBackward<C> {
  static __device__ __forceinline__ Terms<C, 2> apply(C (&v)[2], const AffineEncoding<C>& e,
                                                      const AffineArgs<C>&) {
    const C g = v[0];
    v[0] = g * e.scale;
    return {{g * (v[1] + e.offset), v[0]}};
  }
};

template <class C>
struct QuantizeDequantize : AffineForward<C> {
  static __device__ __forceinline__ void apply(C (&v)[1], const AffineEncoding<C>& e,
                                               const AffineArgs<C>& args) {
    const Grid<C>& grid = args.grid;
    const C q = limit(round_even(v[0] / e.scale - grid.shift) - e.offset, grid.qmin, grid.qmax);
    v[0] = (q + (e.offset + grid.shift)) * e.scale;
  }
};

template <class C>
struct QuantizeDequantizeBackward : AffineBackward<C> {
  static __device__ __forceinline__ Terms<C, 2> apply(C (&v)[2], const AffineEncoding<C>& e,
                                                      const AffineArgs<C>& args) {
    const Grid<C>& grid = args.grid;
    const C g = v[0];
    const C t = v[1] / e.scale - grid.shift;
    const C rounded = round_even(t);
    const C q = rounded - e.offset;
    const bool inside = q >= grid.qmin && q <= grid.qmax;
    const C clamped = limit(rounded, grid.qmin + e.offset, grid.qmax + e.offset);
    const C slope = inside ? rounded - t : clamped;
    v[0] = inside ? g : C(0);
    return {{g * slope, inside ? C(0) : g * e.scale}};
  }
};

}  // namespace rimet
