// Smallest and largest element of each encoding's block, in one read. NaN wins, as in torch. Twin
// of src/kernels/cpu/min_max.rs.

#include "reduce.cuh"

namespace rimet {

// Twin of `MinMaxArgs` in src/kernels/cuda/min_max.rs.
template <class C>
struct MinMaxArgs {
  const void* input;
  C* min;
  C* max;
  u64 vectorized;
};

// The range of what was seen so far.
template <class C>
class MinMaxRange {
 public:
  using Args = MinMaxArgs<C>;
  struct Partial {
    C min;
    C max;
  };

  __device__ __forceinline__ explicit MinMaxRange(const Args& args) : args_(args) {}

  static __device__ __forceinline__ Partial identity() { return {infinity<C>(), -infinity<C>()}; }
  // A NaN in `into` stays (the comparisons are false); one in `from` is taken.
  static __device__ __forceinline__ void combine(Partial& into, const Partial& from) {
    into.min = from.min < into.min || is_nan(from.min) ? from.min : into.min;
    into.max = from.max > into.max || is_nan(from.max) ? from.max : into.max;
  }
  __device__ __forceinline__ void finish(u64 group, const Partial& range) const {
    args_.min[group] = range.min;
    args_.max[group] = range.max;
  }

 protected:
  const Args& args_;
};

template <class T, class C>
class MinMax : public MinMaxRange<C> {
 public:
  using typename MinMaxRange<C>::Args;
  using typename MinMaxRange<C>::Partial;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  struct Encoding {};
  struct Values {
    C x[kWidth];
  };
  struct Accumulator {
    Partial range = MinMaxRange<C>::identity();
  };

  using MinMaxRange<C>::MinMaxRange;

  __device__ __forceinline__ Encoding sole_encoding() const { return {}; }
  __device__ __forceinline__ Encoding encoding(u64) const { return {}; }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    rimet::load(values.x, static_cast<const T*>(args_.input) + start, n, args_.vectorized);
  }
  __device__ __forceinline__ void take(Accumulator& sum, Values& values, u32 j,
                                       const Encoding&) const {
    MinMaxRange<C>::combine(sum.range, {values.x[j], values.x[j]});
  }
  __device__ __forceinline__ void store(const Values&, u64, u32) const {}
  static __device__ __forceinline__ Partial total(const Accumulator& sum) { return sum.range; }

 private:
  using MinMaxRange<C>::args_;
};

}  // namespace rimet
