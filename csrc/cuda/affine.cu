// Affine quantize, dequantize and quantize-dequantize, forward and backward, one pass each. The
// formulas are those of docs/numerics.md; twin of src/kernels/cpu/affine.rs, operation by
// operation.

#include "elementwise.cuh"
#include "range.cuh"
#include "reduce.cuh"

namespace rimet {

// Twin of `AffineArgs` in src/kernels/cuda/affine.rs.
template <class C>
struct AffineArgs {
  const void* input;
  const void* grad;  // backward: the incoming gradient
  void* output;      // or the gradient of the input; backward: may be null
  const C* scale;    // null: derived from min and max, where there is one of each
  const C* offset;
  const C* min;  // null: not a range
  const C* max;
  C* grad_first;   // of scale or min; may be null
  C* grad_second;  // of offset or max; may be null
  u64 vectorized;  // whole 16-byte accesses are aligned
  Grid<C> grid;
};

template <class C>
struct AffineEncoding {
  C scale;
  C offset;
};

template <class C>
__device__ __forceinline__ AffineEncoding<C> encoding_of(const AffineArgs<C>& args, u64 group) {
  return {args.scale[group], args.offset[group]};
}

template <class C>
__device__ __forceinline__ AffineEncoding<C> sole_encoding_of(const AffineArgs<C>& args) {
  if (args.scale) {
    return encoding_of(args, 0);
  }
  const C min = *args.min;
  const C scale = args.grid.scale(min, *args.max);
  return {scale, args.grid.offset(min, scale)};
}

// ---- the operations: the value, and the straight-through gradients of x, scale and offset
// -------------

template <class C>
struct AffineGradients {
  C x;
  C scale;
  C offset;
};

struct Quantize {
  template <class C>
  static __device__ __forceinline__ C value(C x, const AffineEncoding<C>& e, const Grid<C>& grid) {
    return limit(round_even(x / e.scale) - e.offset, grid.qmin, grid.qmax);
  }
  template <class C>
  static __device__ __forceinline__ AffineGradients<C> gradients(C g, C x,
                                                                 const AffineEncoding<C>& e,
                                                                 const Grid<C>& grid) {
    const C t = x / e.scale;
    const C q = round_even(t) - e.offset;
    const bool inside = q >= grid.qmin && q <= grid.qmax;
    g = inside ? g : C(0);
    const C gx = g / e.scale;
    // Outside the grid the terms are exact zeros, not 0 * inf.
    return {gx, inside ? -(gx * t) : C(0), -g};
  }
};

struct Dequantize {
  template <class C>
  static __device__ __forceinline__ C value(C x, const AffineEncoding<C>& e, const Grid<C>&) {
    return (x + e.offset) * e.scale;
  }
  template <class C>
  static __device__ __forceinline__ AffineGradients<C> gradients(C g, C x,
                                                                 const AffineEncoding<C>& e,
                                                                 const Grid<C>&) {
    const C gs = g * e.scale;
    return {gs, g * (x + e.offset), gs};
  }
};

struct QuantizeDequantize {
  template <class C>
  static __device__ __forceinline__ C value(C x, const AffineEncoding<C>& e, const Grid<C>& grid) {
    const C q = limit(round_even(x / e.scale - grid.shift) - e.offset, grid.qmin, grid.qmax);
    return (q + (e.offset + grid.shift)) * e.scale;
  }
  template <class C>
  static __device__ __forceinline__ AffineGradients<C> gradients(C g, C x,
                                                                 const AffineEncoding<C>& e,
                                                                 const Grid<C>& grid) {
    const C t = x / e.scale - grid.shift;
    const C rounded = round_even(t);
    const C q = rounded - e.offset;
    const bool inside = q >= grid.qmin && q <= grid.qmax;
    const C clamped = limit(rounded, grid.qmin + e.offset, grid.qmax + e.offset);
    const C slope = inside ? rounded - t : clamped;
    return {inside ? g : C(0), g * slope, inside ? C(0) : g * e.scale};
  }
};

// ---- over tensors
// -----------------------------------------------------------------------------------

// O::value of each element. T: what the tensors hold; C: what is computed in.
template <class O, class T, class C>
class AffineForward {
 public:
  using Args = AffineArgs<C>;
  using Encoding = AffineEncoding<C>;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  struct Values {
    C x[kWidth];
  };

  __device__ __forceinline__ explicit AffineForward(const Args& args) : args_(args) {}

  __device__ __forceinline__ Encoding sole_encoding() const { return sole_encoding_of(args_); }
  __device__ __forceinline__ Encoding encoding(u64 group) const {
    return encoding_of(args_, group);
  }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    rimet::load(values.x, static_cast<const T*>(args_.input) + start, n, args_.vectorized);
  }
  __device__ __forceinline__ void apply(Values& values, u32 j, const Encoding& e) const {
    values.x[j] = O::template value<C>(values.x[j], e, args_.grid);
  }
  __device__ __forceinline__ void store(const Values& values, u64 start, u32 n) const {
    rimet::store(values.x, static_cast<T*>(args_.output) + start, n, args_.vectorized);
  }

 private:
  const Args& args_;
};

// The sums of the gradients of scale and offset, and what becomes of them: gradients of scale and
// offset, or of min and max.
template <class C>
class AffineSums {
 public:
  using Args = AffineArgs<C>;
  struct Partial {
    double scale;
    double offset;
  };

  __device__ __forceinline__ explicit AffineSums(const Args& args) : args_(args) {}

  static __device__ __forceinline__ Partial identity() { return {0.0, 0.0}; }
  static __device__ __forceinline__ void combine(Partial& into, const Partial& from) {
    into.scale += from.scale;
    into.offset += from.offset;
  }
  __device__ __forceinline__ void finish(u64 group, const Partial& sum) const {
    C first = static_cast<C>(sum.scale);
    C second = static_cast<C>(sum.offset);
    if (args_.min) {
      args_.grid.range_gradient(args_.min[group], args_.max[group], sum.scale, sum.offset, first,
                                second);
    }
    if (args_.grad_first) {
      args_.grad_first[group] = first;
    }
    if (args_.grad_second) {
      args_.grad_second[group] = second;
    }
  }

 protected:
  const Args& args_;
};

// O::gradients: that of x is written, those of scale and offset are summed, in C over at most 256
// elements and in float64 beyond. As an elementwise function: that of x alone.
template <class O, class T, class C>
class AffineBackward : public AffineSums<C> {
 public:
  using typename AffineSums<C>::Args;
  using typename AffineSums<C>::Partial;
  using Encoding = AffineEncoding<C>;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  struct Values {
    C g[kWidth];  // then the gradient of x
    C x[kWidth];
  };
  struct Accumulator {
    C scale = 0;
    C offset = 0;
  };

  using AffineSums<C>::AffineSums;

  __device__ __forceinline__ Encoding sole_encoding() const { return sole_encoding_of(args_); }
  __device__ __forceinline__ Encoding encoding(u64 group) const {
    return encoding_of(args_, group);
  }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    rimet::load(values.g, static_cast<const T*>(args_.grad) + start, n, args_.vectorized);
    rimet::load(values.x, static_cast<const T*>(args_.input) + start, n, args_.vectorized);
  }
  __device__ __forceinline__ void apply(Values& values, u32 j, const Encoding& e) const {
    values.g[j] = O::template gradients<C>(values.g[j], values.x[j], e, args_.grid).x;
  }
  __device__ __forceinline__ void take(Accumulator& sum, Values& values, u32 j,
                                       const Encoding& e) const {
    const auto gradients = O::template gradients<C>(values.g[j], values.x[j], e, args_.grid);
    values.g[j] = gradients.x;
    sum.scale += gradients.scale;
    sum.offset += gradients.offset;
  }
  __device__ __forceinline__ void store(const Values& values, u64 start, u32 n) const {
    if (args_.output) {
      rimet::store(values.g, static_cast<T*>(args_.output) + start, n, args_.vectorized);
    }
  }
  static __device__ __forceinline__ Partial total(const Accumulator& sum) {
    return {static_cast<double>(sum.scale), static_cast<double>(sum.offset)};
  }

 private:
  using AffineSums<C>::args_;
};

}  // namespace rimet
