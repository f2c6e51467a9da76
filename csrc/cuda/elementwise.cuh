// One read, one write: a function of each element and its encoding.
#pragma once

#include "geometry.cuh"

namespace rimet {

template <class Op>
struct ElementwiseArgs {
  typename Op::Args op;
  Geometry geometry;
};

// 16-byte accesses that a thread has under way at a time.
constexpr u32 kAccesses = 2;

// Op gives: Args; kWidth; Values (kWidth elements, read and computed); Encoding, sole_encoding()
// for tensors that have one, encoding(group); load(values, start, n), apply(values, j, encoding),
// store(values, start, n).
template <class Op>
__device__ __forceinline__ void elementwise(const ElementwiseArgs<Op>& args) {
  constexpr u32 N = Op::kWidth;
  const Op op(args.op);
  const Geometry& geometry = args.geometry;
  const u64 first = (static_cast<u64>(blockIdx.x) * kThreads * kAccesses + threadIdx.x) * N;
  if (geometry.uniform) {
    const auto encoding = op.sole_encoding();
    typename Op::Values values[kAccesses];
    u32 counts[kAccesses];
#pragma unroll
    for (u32 i = 0; i < kAccesses; ++i) {
      const u64 start = first + i * kThreads * N;
      counts[i] = geometry.count(start, N);
      op.load(values[i], start, counts[i]);
    }
#pragma unroll
    for (u32 i = 0; i < kAccesses; ++i) {
#pragma unroll
      for (u32 j = 0; j < N; ++j) {
        op.apply(values[i], j, encoding);
      }
      op.store(values[i], first + i * kThreads * N, counts[i]);
    }
    return;
  }
#pragma unroll 1
  for (u32 i = 0; i < kAccesses; ++i) {
    const u64 start = first + i * kThreads * N;
    const u32 count = geometry.count(start, N);
    if (count == 0) {
      return;
    }
    typename Op::Values values;
    op.load(values, start, count);
    u64 row = geometry.inner.divide(start);
    u64 column = start - row * geometry.inner.divisor;
    u64 group = geometry.group_of_row(row) + column * geometry.inner_stride;
    auto encoding = op.encoding(group);
    const bool shared = geometry.inner_stride == 0 && column + count <= geometry.inner.divisor;
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
      op.apply(values, j, encoding);
      if (!shared && j + 1 < count) {
        if (++column == geometry.inner.divisor) {
          column = 0;
          group = geometry.group_of_row(++row);
        } else {
          group += geometry.inner_stride;
        }
        encoding = op.encoding(group);
      }
    }
    op.store(values, start, count);
  }
}

}  // namespace rimet
