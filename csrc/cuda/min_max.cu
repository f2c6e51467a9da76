// Smallest and largest element of each encoding's block, in one read. NaN wins, as in torch. Twin
// of src/kernels/cpu/min_max.rs.

#include "functor.cuh"

namespace rimet {

// Twin of `MinMaxArgs` in src/kernels/cuda/min_max.rs.
template <class C>
struct MinMaxArgs {
  using Encoding = NoEncoding;

  Tensors<1> tensors;
  C* min;
  C* max;

  __device__ __forceinline__ NoEncoding sole_encoding() const { return {}; }
  __device__ __forceinline__ NoEncoding encoding(u64) const { return {}; }
};

// The range of what was seen so far.
template <class C>
class MinMaxRange : public Holder<MinMaxArgs<C>> {
 public:
  struct Partial {
    C min;
    C max;
  };

  using Holder<MinMaxArgs<C>>::Holder;

  static __device__ __forceinline__ Partial identity() { return {infinity<C>(), -infinity<C>()}; }
  // A NaN in `into` stays (the comparisons are false); one in `from` is taken.
  static __device__ __forceinline__ void combine(Partial& into, const Partial& from) {
    into.min = from.min < into.min || is_nan(from.min) ? from.min : into.min;
    into.max = from.max > into.max || is_nan(from.max) ? from.max : into.max;
  }
  __device__ __forceinline__ void finish(u64 group, const Partial& range) const {
    this->args_.min[group] = range.min;
    this->args_.max[group] = range.max;
  }
};

template <class T, class C>
class MinMax : public Access<MinMaxRange<C>, T, C, 1, 0> {
 public:
  using Base = Access<MinMaxRange<C>, T, C, 1, 0>;
  using typename Base::Partial;
  using typename Base::Values;
  struct Accumulator {
    Partial range = Base::identity();
  };

  using Base::Base;

  __device__ __forceinline__ void take(Accumulator& accumulator, const Values& values, u32 j,
                                       NoEncoding) const {
    Base::combine(accumulator.range, {values.x[0][j], values.x[0][j]});
  }
  static __device__ __forceinline__ Partial total(const Accumulator& accumulator) {
    return accumulator.range;
  }
};

}  // namespace rimet
