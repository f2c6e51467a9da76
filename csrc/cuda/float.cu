// Quantize and quantize-dequantize to floating-point formats, forward and backward, one pass each.
// The formulas are those of docs/numerics.md; twin of src/kernels/cpu/float.rs, operation by
// operation.

#include "elementwise.cuh"
#include "reduce.cuh"

namespace rimet {

// The bits of a type that kernels compute in.
template <class C>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Type = u32;
};
template <>
struct BitsOf<double> {
  using Type = u64;
};
template <class C>
using Bits = typename BitsOf<C>::Type;

template <class C>
__device__ __forceinline__ Bits<C> bits_of(C x) {
  Bits<C> bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <class C>
__device__ __forceinline__ C of_bits(Bits<C> bits) {
  C x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

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
    const Bits<C> magnitude_bits = bits_of(x) & ~sign_mask();
    const C magnitude = of_bits<C>(magnitude_bits);
    const Bits<C> tie = ((magnitude_bits >> dropped) | implicit) & odd;
    const C normal = of_bits<C>((magnitude_bits + (below_half + tie)) & kept);
    const C subnormal = (magnitude + finest) - finest;
    C rounded = min_normal <= magnitude ? normal : subnormal;
    rounded = rounded < max ? rounded : max;
    return of_bits<C>(bits_of(rounded) | (bits_of(x) & sign_mask())) + zero;
  }

  // Whether x is not beyond the largest value; false for NaN.
  __device__ __forceinline__ bool inside(C x) const {
    return of_bits<C>(bits_of(x) & ~sign_mask()) <= max;
  }

 private:
  static __device__ __forceinline__ Bits<C> sign_mask() {
    return Bits<C>(1) << (8 * sizeof(C) - 1);
  }
};

// Twin of `FloatArgs` in src/kernels/cuda/float.rs.
template <class C>
struct FloatArgs {
  const void* input;
  const void* grad;  // backward: the incoming gradient
  void* output;      // or the gradient of the input; backward: may be null
  const C* scale;
  C* grad_scale;
  u64 vectorized;  // whole 16-byte accesses are aligned
  Rounding<C> rounding;
};

// ---- the operations: the value, and the straight-through gradients of x and scale
// -----------------------------

template <class C>
struct FloatGradients {
  C x;
  C scale;
};

struct FloatQuantize {
  template <class C>
  static __device__ __forceinline__ C value(C x, C scale, const Rounding<C>& rounding) {
    return rounding.nearest(x / scale);
  }
  template <class C>
  static __device__ __forceinline__ FloatGradients<C> gradients(C g, C x, C scale,
                                                                const Rounding<C>& rounding) {
    const C ratio = x / scale;
    if (!rounding.inside(ratio)) {
      return {C(0), C(0)};
    }
    const C gx = g / scale;
    return {gx, -(gx * ratio)};
  }
};

struct FloatQuantizeDequantize {
  template <class C>
  static __device__ __forceinline__ C value(C x, C scale, const Rounding<C>& rounding) {
    return rounding.nearest(x / scale) * scale;
  }
  template <class C>
  static __device__ __forceinline__ FloatGradients<C> gradients(C g, C x, C scale,
                                                                const Rounding<C>& rounding) {
    const C ratio = x / scale;
    const C value = rounding.nearest(ratio);
    if (!rounding.inside(ratio)) {
      return {C(0), g * value};
    }
    return {g, g * (value - ratio)};
  }
};

// ---- over tensors
// -----------------------------------------------------------------------------------

// O::value of each element. T: what the tensors hold; C: what is computed in.
template <class O, class T, class C>
class FloatForward {
 public:
  using Args = FloatArgs<C>;
  using Encoding = C;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  struct Values {
    C x[kWidth];
  };

  __device__ __forceinline__ explicit FloatForward(const Args& args) : args_(args) {}

  __device__ __forceinline__ C sole_encoding() const { return args_.scale[0]; }
  __device__ __forceinline__ C encoding(u64 group) const { return args_.scale[group]; }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    rimet::load(values.x, static_cast<const T*>(args_.input) + start, n, args_.vectorized);
  }
  __device__ __forceinline__ void apply(Values& values, u32 j, C scale) const {
    values.x[j] = O::template value<C>(values.x[j], scale, args_.rounding);
  }
  __device__ __forceinline__ void store(const Values& values, u64 start, u32 n) const {
    rimet::store(values.x, static_cast<T*>(args_.output) + start, n, args_.vectorized);
  }

 private:
  const Args& args_;
};

// The sums of the gradients of the scale.
template <class C>
class FloatSums {
 public:
  using Args = FloatArgs<C>;
  using Partial = double;

  __device__ __forceinline__ explicit FloatSums(const Args& args) : args_(args) {}

  static __device__ __forceinline__ double identity() { return 0.0; }
  static __device__ __forceinline__ void combine(double& into, double from) { into += from; }
  __device__ __forceinline__ void finish(u64 group, double sum) const {
    args_.grad_scale[group] = static_cast<C>(sum);
  }

 protected:
  const Args& args_;
};

// O::gradients: that of x is written, that of the scale is summed, in C over at most 256 elements
// and in float64 beyond. As an elementwise function: that of x alone.
template <class O, class T, class C>
class FloatBackward : public FloatSums<C> {
 public:
  using typename FloatSums<C>::Args;
  using typename FloatSums<C>::Partial;
  using Encoding = C;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  struct Values {
    C g[kWidth];  // then the gradient of x
    C x[kWidth];
  };
  struct Accumulator {
    C scale = 0;
  };

  using FloatSums<C>::FloatSums;

  __device__ __forceinline__ C sole_encoding() const { return args_.scale[0]; }
  __device__ __forceinline__ C encoding(u64 group) const { return args_.scale[group]; }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    rimet::load(values.g, static_cast<const T*>(args_.grad) + start, n, args_.vectorized);
    rimet::load(values.x, static_cast<const T*>(args_.input) + start, n, args_.vectorized);
  }
  __device__ __forceinline__ void apply(Values& values, u32 j, C scale) const {
    values.g[j] = O::template gradients<C>(values.g[j], values.x[j], scale, args_.rounding).x;
  }
  __device__ __forceinline__ void take(Accumulator& sum, Values& values, u32 j, C scale) const {
    const auto gradients =
        O::template gradients<C>(values.g[j], values.x[j], scale, args_.rounding);
    values.g[j] = gradients.x;
    sum.scale += gradients.scale;
  }
  __device__ __forceinline__ void store(const Values& values, u64 start, u32 n) const {
    if (args_.output) {
      rimet::store(values.g, static_cast<T*>(args_.output) + start, n, args_.vectorized);
    }
  }
  static __device__ __forceinline__ Partial total(const Accumulator& sum) {
    return static_cast<double>(sum.scale);
  }

 private:
  using FloatSums<C>::args_;
};

}  // namespace rimet
