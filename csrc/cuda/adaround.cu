// AdaRound: soft rounding and its gradient, the rounding regularizer and its gradient, and a whole
// optimization step in one pass. Twin of src/kernels/cpu/adaround.rs, operation by operation, where
// the equations are.

#include "functor.cuh"
#include "math.cuh"

namespace rimet {

// Twin of `AdaroundArgs` in src/kernels/cuda/adaround.rs.
template <class C>
struct AdaroundArgs {
  struct Encoding {
    C scale;
    C offset;
  };

  Tensors<9> tensors;
  const C* scale;
  const C* offset;
  C qmin;
  C qmax;
  C reg_param;
  C beta;
  C step_size;
  C correction;     // of the second moment's root: one over its bias correction
  u64 soft;         // or else each weight is rounded up or down
  u64 regularized;  // reg_param is not 0

  __device__ __forceinline__ Encoding encoding(u64 group) const {
    return {scale[group], offset[group]};
  }
  __device__ __forceinline__ Encoding sole_encoding() const { return encoding(0); }

  // The value at a position on the grid, floor(x / scale) + h.
  __device__ __forceinline__ C value(C position, const Encoding& e) const {
    return (limit(position - e.offset, qmin, qmax) + e.offset) * e.scale;
  }
  // The gradient of the position's h, times slope: none off the grid.
  __device__ __forceinline__ C gradient(C grad, C position, C slope, const Encoding& e) const {
    const C level = position - e.offset;
    return qmin <= level && level <= qmax ? grad * e.scale * slope : C(0);
  }
};

// h(alpha) and its derivative. The clamp passes the gradient on its bounds, as torch's does.
template <class C>
struct RectifiedSigmoid {
  C h;
  C slope;

  __device__ __forceinline__ explicit RectifiedSigmoid(C alpha) {
    constexpr C kGamma = C(-0.1);
    constexpr C kStretch = C(1.1 - -0.1);
    const C sigmoid = C(1) / (C(1) + exp_of(C(0) - alpha));
    const C raw = sigmoid * kStretch + kGamma;
    h = limit(raw, C(0), C(1));
    slope = C(0) <= raw && raw <= C(1) ? (kStretch * sigmoid) * (C(1) - sigmoid) : C(0);
  }
};

// |2 h - 1|^exponent with the sign of 2 h - 1.
template <class C>
__device__ __forceinline__ C signed_power(C h, C exponent) {
  constexpr C kSmallest = C(1e-30);
  constexpr C kSmallestLogarithm = C(-60);
  const C u = (h + h) - C(1);
  const C magnitude = magnitude_of(u);
  C logarithm = ln_of(magnitude > kSmallest ? magnitude : kSmallest) * exponent;
  logarithm = kSmallestLogarithm > logarithm ? kSmallestLogarithm : logarithm;
  return with_sign_of(exp_of(logarithm), u);
}

// The gradient of 1 - |2 h - 1|^beta with respect to alpha.
template <class C>
__device__ __forceinline__ C regularizer_slope(const RectifiedSigmoid<C>& rounded, C beta) {
  return (C(0) - (beta + beta)) * signed_power(rounded.h, beta - C(1)) * rounded.slope;
}

template <class C>
struct AdaroundForward {
  using Args = AdaroundArgs<C>;
  static constexpr u32 kInputs = 2;  // the weights, alpha
  static constexpr u32 kOutputs = 1;

  static __device__ __forceinline__ void apply(C (&v)[2], const typename Args::Encoding& e,
                                               const Args& args) {
    const C h = args.soft ? RectifiedSigmoid<C>(v[1]).h : C(0) <= v[1] ? C(1) : C(0);
    v[0] = args.value(floor_of(v[0] / e.scale) + h, e);
  }
};

template <class C>
struct AdaroundBackward {
  using Args = AdaroundArgs<C>;
  static constexpr u32 kInputs = 3;  // the incoming gradient, the weights, alpha
  static constexpr u32 kOutputs = 1;

  static __device__ __forceinline__ void apply(C (&v)[3], const typename Args::Encoding& e,
                                               const Args& args) {
    const RectifiedSigmoid<C> rounded(v[2]);
    v[0] = args.gradient(v[0], floor_of(v[1] / e.scale) + rounded.h, rounded.slope, e);
  }
};

// The gradient of reconstruction + reg_param * regularizer, Adam, and the weights that follow.
template <class C>
struct AdaroundStep {
  using Args = AdaroundArgs<C>;
  static constexpr u32 kInputs = 5;   // alpha, both moments, the incoming gradient, the weights
  static constexpr u32 kOutputs = 4;  // alpha, both moments, the soft-rounded weights

  static __device__ __forceinline__ void apply(C (&v)[5], const typename Args::Encoding& e,
                                               const Args& args) {
    constexpr C kBeta1 = C(0.9);
    constexpr C kOneMinusBeta1 = C(1.0 - 0.9);
    constexpr C kBeta2 = C(0.999);
    constexpr C kOneMinusBeta2 = C(1.0 - 0.999);
    constexpr C kEpsilon = C(1e-8);
    const RectifiedSigmoid<C> rounded(v[0]);
    const C regularizer =
        args.regularized ? args.reg_param * regularizer_slope(rounded, args.beta) : C(0);
    const C base = floor_of(v[4] / e.scale);
    const C total = args.gradient(v[3], base + rounded.h, rounded.slope, e) + regularizer;
    v[1] = kBeta1 * v[1] + kOneMinusBeta1 * total;
    v[2] = kBeta2 * v[2] + kOneMinusBeta2 * (total * total);
    v[0] = v[0] - args.step_size * (v[1] / (root_of(v[2]) * args.correction + kEpsilon));
    v[3] = args.value(base + RectifiedSigmoid<C>(v[0]).h, e);
  }
};

// Twin of `RegularizerArgs` in src/kernels/cuda/adaround.rs.
template <class C>
struct RegularizerArgs {
  using Encoding = C;  // the incoming gradient
  static constexpr u32 kSums = 1;

  Tensors<2> tensors;
  const C* grad;  // forward: null
  C* sum;         // backward: null
  C beta;

  __device__ __forceinline__ C encoding(u64) const { return grad ? *grad : C(1); }
  __device__ __forceinline__ C sole_encoding() const { return encoding(0); }
  __device__ __forceinline__ void finish(u64, const double (&sums)[1]) const {
    *sum = static_cast<C>(sums[0]);
  }
};

template <class C>
using RegularizerSums = Sums<RegularizerArgs<C>>;

template <class C>
struct Regularizer {
  using Args = RegularizerArgs<C>;
  static constexpr u32 kInputs = 1;  // alpha
  static constexpr u32 kOutputs = 0;

  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[1], C, const Args& args) {
    return {{C(1) - magnitude_of(signed_power(RectifiedSigmoid<C>(v[0]).h, args.beta))}};
  }
};

template <class C>
struct RegularizerBackward {
  using Args = RegularizerArgs<C>;
  static constexpr u32 kInputs = 1;  // alpha
  static constexpr u32 kOutputs = 1;

  static __device__ __forceinline__ void apply(C (&v)[1], C grad, const Args& args) {
    v[0] = grad * regularizer_slope(RectifiedSigmoid<C>(v[0]), args.beta);
  }
};

// Twin of `ReconstructionArgs` in src/kernels/cuda/adaround.rs.
template <class C>
struct ReconstructionArgs {
  using Encoding = NoEncoding;

  Tensors<3> tensors;
  C factor;
  u64 relu;

  __device__ __forceinline__ NoEncoding encoding(u64) const { return {}; }
  __device__ __forceinline__ NoEncoding sole_encoding() const { return {}; }
};

template <class C>
struct ReconstructionGradient {
  using Args = ReconstructionArgs<C>;
  static constexpr u32 kInputs = 2;  // the output, the target
  static constexpr u32 kOutputs = 1;

  static __device__ __forceinline__ void apply(C (&v)[2], NoEncoding, const Args& args) {
    const C target = args.relu && v[1] <= C(0) ? C(0) : v[1];
    v[0] = args.relu && v[0] <= C(0) ? C(0) : (v[0] - target) * args.factor;
  }
};

}  // namespace rimet
