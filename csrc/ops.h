// What the op files share: the schema strings' C++ types and the registration hooks.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <exception>
#include <tuple>
#include <vector>

#include "engine.h"

namespace rimet {

using at::Tensor;
using Block = at::OptionalIntArrayRef;

// A block size that outlives the call.
inline std::optional<std::vector<int64_t>> copy(Block block) {
  if (!block.has_value()) {
    return std::nullopt;
  }
  return block->vec();
}

// An affine op's arguments beside its tensors. The block size is copied, since autograd keeps it.
struct AffineArgs {
  enum Op : int32_t { kQuantize = 0, kDequantize = 1, kQuantizeDequantize = 2 };

  const char* name;  // for messages
  Op op;
  bool is_range = false;
  int64_t qmin = 0;
  int64_t qmax = 1;
  bool symmetric = false;
  double zero_point_shift = 0.0;
  std::optional<std::vector<int64_t>> block;

  AffineArgs(const char* name, Op op) : name(name), op(op) {}

  // float64 input, and grids that float32 cannot hold, are computed in float64.
  at::ScalarType compute_type(at::ScalarType input) const;
};

using Grads = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;
using Pair = std::tuple<Tensor, Tensor>;

// One implementation per kind of device.
Tensor affine_forward_cpu(const AffineArgs&, const Tensor& input, const Tensor& first,
                          const Tensor& second);
Grads affine_backward_cpu(const AffineArgs&, const Tensor& grad, const Tensor& input,
                          const Tensor& first, const Tensor& second, Mask);
Tensor affine_forward_cuda(const AffineArgs&, const Tensor& input, const Tensor& first,
                           const Tensor& second);
Grads affine_backward_cuda(const AffineArgs&, const Tensor& grad, const Tensor& input,
                           const Tensor& first, const Tensor& second, Mask);
Tensor affine_forward_tensor_ops(const AffineArgs&, const Tensor& input, const Tensor& first,
                                 const Tensor& second);
Grads affine_backward_tensor_ops(const AffineArgs&, const Tensor& grad, const Tensor& input,
                                 const Tensor& first, const Tensor& second, Mask);
Pair range_to_scale_offset_tensor_ops(const AffineArgs&, const Tensor& min, const Tensor& max);
Pair range_to_scale_offset_backward_tensor_ops(const AffineArgs&, const Tensor& grad_scale,
                                               const Tensor& grad_offset, const Tensor& min,
                                               const Tensor& max);
Tensor affine_forward_meta(const AffineArgs&, const Tensor& input, const Tensor& first,
                           const Tensor& second);
Grads affine_backward_meta(const AffineArgs&, const Tensor& grad, const Tensor& input,
                           const Tensor& first, const Tensor& second, Mask);

// The two encoding tensors, checked, as contiguous arrays of the compute type.
struct Encodings {
  Tensor first;
  Tensor second;

  Encodings(const AffineArgs&, const Tensor& input, const Tensor& first, const Tensor& second);
};
RimetAffine engine_args(const AffineArgs&, const Tensor& input, const Encodings&);

// Raises the engine's error if the status says so.
void check_status(int32_t status, const char* op);
RimetView view_of(const Tensor& tensor);
// The tensor itself, or a copy of it laid out as at::empty_like lays it out.
Tensor dense(const Tensor& tensor);
// `like`'s layout exactly.
Tensor laid_out_as(const Tensor& tensor, const Tensor& like);
// at::empty_like, for results that are as large as what a kernel reads.
Tensor result_like(const Tensor& like);

// The input split into blocks ([.., groups, block, groups, block, ..]) and the encodings shaped to
// broadcast against it; for the implementations in tensor ops.
struct Blocks {
  std::vector<int64_t> shape;  // of the split input
  std::vector<int64_t> encoding;

  Blocks(const char* op, at::IntArrayRef input, at::IntArrayRef groups,
         const std::optional<std::vector<int64_t>>& block);
};

// One call of the engine's CUDA kernels: the tensor's device is current, scratch memory lives until
// the end. Where a kernel cannot be had, callers go on with tensor ops.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& tensor);
  CudaCall(const CudaCall&) = delete;

  const RimetDevice* device() const { return &device_; }
  // Whether the kernel ran; raises what went wrong.
  bool ran(int32_t status, const char* op) const;

  void* allocate(int64_t bytes);

 private:
  at::TensorOptions options_;
  c10::DeviceGuard guard_;
  RimetDevice device_;
  std::vector<Tensor> scratch_;
  std::exception_ptr error_;
};

// Registration, one function a file and dispatch key; called by schemas.cpp.
void register_affine_cpu(torch::Library&);
void register_affine_cuda(torch::Library&);
void register_affine_composite(torch::Library&);
void register_affine_meta(torch::Library&);
void register_affine_autograd(torch::Library&);
void register_float_cpu(torch::Library&);
void register_float_cuda(torch::Library&);
void register_float_composite(torch::Library&);
void register_float_meta(torch::Library&);
void register_float_autograd(torch::Library&);
void register_grouped_block_cpu(torch::Library&);
void register_grouped_block_composite(torch::Library&);
void register_grouped_block_meta(torch::Library&);
void register_grouped_block_autograd(torch::Library&);
void register_min_max_cpu(torch::Library&);
void register_min_max_cuda(torch::Library&);
void register_min_max_composite(torch::Library&);
void register_min_max_meta(torch::Library&);
void register_adaround_cpu(torch::Library&);
void register_adaround_cuda(torch::Library&);
void register_adaround_composite(torch::Library&);
void register_adaround_meta(torch::Library&);
void register_adaround_autograd(torch::Library&);
void register_seq_mse_cpu(torch::Library&);
void register_seq_mse_cuda(torch::Library&);
void register_seq_mse_composite(torch::Library&);
void register_seq_mse_meta(torch::Library&);

}  // namespace rimet
