// Reconstruction errors of Sequential MSE: sums along rows, in one read. Twin of
// src/kernels/cpu/seq_mse.rs.

#include "functor.cuh"

namespace rimet {

// Twin of `RowSumArgs` in src/kernels/cuda/seq_mse.rs.
template <class C>
struct RowSumArgs {
  using Encoding = NoEncoding;
  static constexpr u32 kSums = 1;

  Tensors<2> tensors;
  double* sums;  // one for each row

  __device__ __forceinline__ NoEncoding encoding(u64) const { return {}; }
  __device__ __forceinline__ NoEncoding sole_encoding() const { return {}; }
  __device__ __forceinline__ void finish(u64 row, const double (&row_sums)[1]) const {
    sums[row] = row_sums[0];
  }
};

template <class C>
using RowSums = Sums<RowSumArgs<C>>;

template <class C>
struct RowSum {
  using Args = RowSumArgs<C>;
  static constexpr u32 kInputs = 2;  // a and b
  static constexpr u32 kOutputs = 0;
};

template <class C>
struct SquaredDifference : RowSum<C> {
  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[2], NoEncoding, const RowSumArgs<C>&) {
    const C difference = v[0] - v[1];
    return {{difference * difference}};
  }
};

template <class C>
struct AbsoluteDifference : RowSum<C> {
  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[2], NoEncoding, const RowSumArgs<C>&) {
    return {{magnitude_of(v[0] - v[1])}};
  }
};

template <class C>
struct Product : RowSum<C> {
  static __device__ __forceinline__ Terms<C, 1> apply(C (&v)[2], NoEncoding, const RowSumArgs<C>&) {
    return {{v[0] * v[1]}};
  }
};

}  // namespace rimet
