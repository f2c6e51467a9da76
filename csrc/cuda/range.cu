// range_to_scale_offset and its backward pass: one thread for each range.

#include "range.cuh"

namespace rimet {

// Twin of `RangeArgs` in src/kernels/cuda/range.rs.
template <class C>
struct RangeArgs {
  const C* min;
  const C* max;
  const C* grad_scale;
  const C* grad_offset;
  C* first;   // scale, or the gradient of min
  C* second;  // offset, or the gradient of max
  u64 n;
  Grid<C> grid;
};

template <class C>
__device__ __forceinline__ void range_to_scale_offset(const RangeArgs<C>& args) {
  const u64 i = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.n) {
    const C scale = args.grid.scale(args.min[i], args.max[i]);
    args.first[i] = scale;
    args.second[i] = args.grid.offset(args.min[i], scale);
  }
}

template <class C>
__device__ __forceinline__ void range_to_scale_offset_backward(const RangeArgs<C>& args) {
  const u64 i = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.n) {
    args.grid.range_gradient(args.min[i], args.max[i], static_cast<double>(args.grad_scale[i]),
                             static_cast<double>(args.grad_offset[i]), args.first[i],
                             args.second[i]);
  }
}

}  // namespace rimet
