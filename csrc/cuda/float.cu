// Quantize and quantize-dequantize to floating-point formats, forward and backward, one pass each.
// The formulas are those of docs/numerics.md; twin of src/kernels/cpu/float.rs, operation by
// operation.

#include "functor.cuh"

namespace rimet {

// A format's constants. Twin of `Rounding` in src/kernels/cpu/float.rs, which explains them.
template <class C>
struct Rounding {
  Bits<C> below_half;
  Bits<C> kept;
  Bits<C> odd;
  Bits<C> implicit;
  C min_normal;
  C finest;
  C max;
  C zero;
  u32 dropped;

  // The nearest value of the format, ties to even; beyond the largest value, that one. NaN stays.
  __device__ __forceinline__ C nearest(C x) const {
    if (is_nan(x)) {
      return x;
    }
    const C magnitude = magnitude_of(x);
    const Bits<C> magnitude_bits = bits_of(magnitude);
    const Bits<C> tie = ((magnitude_bits >> dropped) | implicit) & odd;
    const C normal = of_bits<C>((magnitude_bits + (below_half + tie)) & kept);
    const C subnormal = (magnitude + finest) - finest;
    C rounded = min_normal <= magnitude ? normal : subnormal;
    rounded = rounded < max ? rounded : max;
    return with_sign_of(rounded, x) + zero;
  }

  // Whether x is not beyond the largest value; false for NaN.
  __device__ __forceinline__ bool inside(C x) const { return magnitude_of(x) <= max; }
};

// Twin of `FloatArgs` in src/kernels/cuda/float.rs.
template <class C>
struct FloatArgs {
  using Encoding = C;  // a scale
  static constexpr u32 kSums = 1;

  Tensors<3> tensors;
  const C* scale;
  C* grad_scale;
  Rounding<C> rounding;

  __device__ __forceinline__ C sole_encoding() const { return scale[0]; }
  __device__ __forceinline__ C encoding(u64 group) const { return scale[group]; }
  __device__ __forceinline__ void finish(u64 group, const double (&sums)[1]) const {
    grad_scale[group] = static_cast<C>(sums[0]);
  }
};

template <class C>
using FloatSums = Sums<FloatArgs<C>>;

// ---- the operations, and their straight-through gradients
// -----------------------------------------------------

template <class C>
struct FloatForward {
  using Args = FloatArgs<C>;
  static constexpr u32 kInputs = 1;  // x
  static constexpr u32 kOutputs = 1;
};

// The gradient of x; summed, that of the scale.
template <class C>
struct FloatBackward {
  using Args = FloatArgs<C>;
  static constexpr u32 kInputs = 2;  // the incoming gradient, x
  static constexpr u32 kOutputs = 1;
};

template <class C>
struct FloatQuantize : FloatForward<C> {
  static __device__ __forceinline__ void apply(C (&v)[1], C scale, const FloatArgs<C>& args) {
    v[0] = args.rounding.nearest(v[0] / scale);
  }
};

template <class C>
struct FloatQuantizeBackward : FloatBackward<C> {
  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[2], C scale,
                                                      const FloatArgs<C>& args) {
    const C ratio = v[1] / scale;
    if (!args.rounding.inside(ratio)) {
      v[0] = C(0);
      return {{C(0)}};
    }
    v[0] = v[0] / scale;
    return {{-(v[0] * ratio)}};
  }
};

template <class C>
struct FloatQuantizeDequantize : FloatForward<C> {
  static __device__ __forceinline__ void apply(C (&v)[1], C scale, const FloatArgs<C>& args) {
    v[0] = args.rounding.nearest(v[0] / scale) * scale;
  }
};

template <class C>
struct FloatQuantizeDequantizeBackward : FloatBackward<C> {
  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[2], C scale,
                                                      const FloatArgs<C>& args) {
    const C g = v[0];
    const C ratio = v[1] / scale;
    const C value = args.rounding.nearest(ratio);
    if (!args.rounding.inside(ratio)) {
      v[0] = C(0);
      return {{g * value}};
    }
    return {{g * (value - ratio)}};
  }
};

}  // namespace rimet
