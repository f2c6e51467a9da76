// quantize, dequantize, quantize_dequantize (from scale and offset, or from a range): the engine's
// kernels on CPU and CUDA, shapes for Meta, and the dispatcher's entry points.

#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>

#include "ops.h"

namespace rimet {

void check_status(int32_t status, const char* op) {
  switch (status) {
    case 0:
      return;
    case 1:
      TORCH_CHECK_VALUE(false, "rimet::", op, ": ", rimet_last_error());
    case 2:
      TORCH_CHECK_TYPE(false, "rimet::", op, ": ", rimet_last_error());
    default:
      TORCH_CHECK(false, "rimet::", op, ": ", rimet_last_error());
  }
}

RimetView view_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.sizes().data(), tensor.strides().data(), tensor.dim(),
          static_cast<int32_t>(tensor.scalar_type())};
}

Tensor dense(const Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) {
    return tensor;
  }
  return at::empty_like(tensor).copy_(tensor);
}

Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == like.scalar_type()) {
    return tensor;
  }
  return at::empty_like(like).copy_(tensor);
}

at::ScalarType AffineArgs::compute_type(at::ScalarType input) const {
  constexpr int64_t kLimit = int64_t{1} << 24;
  const bool fits =
      op == kDequantize || (qmin >= -kLimit && qmax <= kLimit && qmax - qmin <= kLimit);
  return input == at::kDouble || !fits ? at::kDouble : at::kFloat;
}

namespace {

Tensor as_array(const Tensor& t, at::ScalarType type) {
  if (t.scalar_type() == type && t.is_contiguous()) {
    return t;
  }
  return t.to(type, /*non_blocking=*/false, /*copy=*/false, at::MemoryFormat::Contiguous)
      .contiguous();
}

RimetAffine engine_args(const AffineArgs& args, at::ScalarType input, at::IntArrayRef encoding,
                        const void* first, const void* second) {
  RimetAffine a{};
  a.first = first;
  a.second = second;
  a.encoding = encoding.data();
  a.encoding_ndim = static_cast<int64_t>(encoding.size());
  a.block = args.block ? args.block->data() : nullptr;
  a.block_len = args.block ? static_cast<int64_t>(args.block->size()) : -1;
  a.qmin = args.qmin;
  a.qmax = args.qmax;
  a.zero_point_shift = args.zero_point_shift;
  a.op = args.op;
  a.is_range = args.is_range;
  a.symmetric = args.symmetric;
  a.double_compute = args.compute_type(input) == at::kDouble;
  return a;
}

}  // namespace

Encodings::Encodings(const AffineArgs& args, const Tensor& input, const Tensor& a,
                     const Tensor& b) {
  const char* a_name = args.is_range ? "min" : "scale";
  const char* b_name = args.is_range ? "max" : "offset";
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), "rimet::", args.name, ": ", b_name,
                    ": expected the shape of ", a_name, " ", a.sizes(), ", got ", b.sizes());
  TORCH_CHECK(a.device() == input.device() && b.device() == input.device(), "rimet::", args.name,
              ": ", a_name, ", ", b_name, ": expected the input's device ", input.device(),
              ", got ", a.device(), " and ", b.device());
  TORCH_CHECK_TYPE(at::isFloatingType(a.scalar_type()) && at::isFloatingType(b.scalar_type()),
                   "rimet::", args.name, ": ", a_name, ", ", b_name,
                   ": expected floating-point tensors, got ", a.scalar_type(), " and ",
                   b.scalar_type());
  const auto type = args.compute_type(input.scalar_type());
  first = as_array(a, type);
  second = as_array(b, type);
}

RimetAffine engine_args(const AffineArgs& args, const Tensor& input, const Encodings& e) {
  return engine_args(args, input.scalar_type(), e.first.sizes(), e.first.const_data_ptr(),
                     e.second.const_data_ptr());
}

// The kernels of a device are given as functions of the engine's arguments, which are the same on
// all.

template <class Kernel>
static Tensor run_forward(const AffineArgs& args, const Tensor& input, const Tensor& first,
                          const Tensor& second, Kernel&& kernel) {
  const Encodings encodings(args, input, first, second);
  const Tensor x = dense(input);
  Tensor output = result_like(x);
  const auto affine = engine_args(args, x, encodings);
  const auto view = view_of(x);
  kernel(&affine, &view, output.data_ptr());
  return output;
}

template <class Kernel>
static Grads run_backward(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                          const Tensor& first, const Tensor& second, Mask mask, Kernel&& kernel) {
  const Encodings encodings(args, input, first, second);
  const Tensor x = dense(input);
  const Tensor g = laid_out_as(grad, x);
  Tensor grad_input = mask[0] ? result_like(x) : Tensor();
  Tensor grad_first = mask[1] ? at::empty_like(encodings.first) : Tensor();
  Tensor grad_second = mask[2] ? at::empty_like(encodings.second) : Tensor();
  const auto data = [](const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  const auto affine = engine_args(args, x, encodings);
  const auto view = view_of(x);
  kernel(&affine, &view, g.data_ptr(), data(grad_input), data(grad_first), data(grad_second));
  if (mask[1]) {
    grad_first = grad_first.to(first.scalar_type());
  }
  if (mask[2]) {
    grad_second = grad_second.to(second.scalar_type());
  }
  return {grad_input, grad_first, grad_second};
}

Tensor affine_forward_cpu(const AffineArgs& args, const Tensor& input, const Tensor& first,
                          const Tensor& second) {
  return run_forward(args, input, first, second, [&](auto... arguments) {
    check_status(rimet_affine_forward(arguments...), args.name);
  });
}

Grads affine_backward_cpu(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                          const Tensor& first, const Tensor& second, Mask mask) {
  return run_backward(args, grad, input, first, second, mask, [&](auto... arguments) {
    check_status(rimet_affine_backward(arguments...), args.name);
  });
}

// float64 arithmetic over other dtypes (grids beyond 24 bits) goes by way of float64 tensors: too
// rare for kernels of its own.

Tensor affine_forward_cuda(const AffineArgs& args, const Tensor& input, const Tensor& first,
                           const Tensor& second) {
  const auto type = input.scalar_type();
  if (type != at::kDouble && args.compute_type(type) == at::kDouble) {
    return affine_forward_cuda(args, input.to(at::kDouble), first, second).to(type);
  }
  CudaCall call(input);
  bool ran = false;
  const Tensor output = run_forward(args, input, first, second, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_affine_forward(call.device(), arguments...), args.name);
  });
  return ran ? output : affine_forward_tensor_ops(args, input, first, second);
}

Grads affine_backward_cuda(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                           const Tensor& first, const Tensor& second, Mask mask) {
  const auto type = input.scalar_type();
  if (type != at::kDouble && args.compute_type(type) == at::kDouble) {
    auto [x, a, b] = affine_backward_cuda(args, grad.to(at::kDouble), input.to(at::kDouble), first,
                                          second, mask);
    return {mask[0] ? x.to(type) : x, a, b};
  }
  CudaCall call(input);
  bool ran = false;
  const Grads grads = run_backward(args, grad, input, first, second, mask, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_affine_backward(call.device(), arguments...), args.name);
  });
  return ran ? grads : affine_backward_tensor_ops(args, grad, input, first, second, mask);
}

// The kernel reads each block before it writes it, so `input` may be the output, too.
static void affine_forward_inplace_cpu(const AffineArgs& args, Tensor& input, const Tensor& first,
                                       const Tensor& second) {
  if (!input.is_non_overlapping_and_dense()) {
    input.copy_(affine_forward_cpu(args, input, first, second));
    return;
  }
  const Encodings encodings(args, input, first, second);
  const auto affine = engine_args(args, input, encodings);
  const auto view = view_of(input);
  check_status(rimet_affine_forward(&affine, &view, input.data_ptr()), args.name);
}

Tensor affine_forward_meta(const AffineArgs& args, const Tensor& input, const Tensor& first,
                           const Tensor& second) {
  const auto symbolic = [](const Tensor& t) {
    return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (!symbolic(input) && !symbolic(first)) {
    const auto affine =
        engine_args(args, input.scalar_type(), first.sizes(), /*first=*/nullptr, nullptr);
    const RimetView view{nullptr, input.sizes().data(), input.strides().data(), input.dim(),
                         static_cast<int32_t>(input.scalar_type())};
    check_status(rimet_affine_check(&affine, &view), args.name);
  }
  return at::empty_like(input);
}

Grads affine_backward_meta(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                           const Tensor& first, const Tensor& second, Mask mask) {
  return {mask[0] ? at::empty_like(input) : Tensor(),
          mask[1] ? at::empty_like(first, at::MemoryFormat::Contiguous) : Tensor(),
          mask[2] ? at::empty_like(second, at::MemoryFormat::Contiguous) : Tensor()};
}

// ---- entry points -------------------------------------------------------------------------------

namespace {

AffineArgs quantize_args(int64_t qmin, int64_t qmax, Block block) {
  AffineArgs a("quantize", AffineArgs::kQuantize);
  a.qmin = qmin;
  a.qmax = qmax;
  a.block = copy(block);
  return a;
}

AffineArgs dequantize_args(Block block) {
  AffineArgs a("dequantize", AffineArgs::kDequantize);
  a.block = copy(block);
  return a;
}

AffineArgs qdq_args(int64_t qmin, int64_t qmax, double shift, Block block) {
  AffineArgs a("quantize_dequantize", AffineArgs::kQuantizeDequantize);
  a.qmin = qmin;
  a.qmax = qmax;
  a.zero_point_shift = shift;
  a.block = copy(block);
  return a;
}

AffineArgs range_args(int64_t qmin, int64_t qmax, bool symmetric, double shift, Block block) {
  AffineArgs a("quantize_dequantize_range", AffineArgs::kQuantizeDequantize);
  a.is_range = true;
  a.qmin = qmin;
  a.qmax = qmax;
  a.symmetric = symmetric;
  a.zero_point_shift = shift;
  a.block = copy(block);
  return a;
}

using ForwardFn = Tensor(const AffineArgs&, const Tensor&, const Tensor&, const Tensor&);
using InplaceFn = void(const AffineArgs&, Tensor&, const Tensor&, const Tensor&);
using BackwardFn = Grads(const AffineArgs&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, Mask);

// The four ops and their backward passes for one kind of device.
template <ForwardFn* forward, BackwardFn* backward>
void register_affine(torch::Library& m) {
  m.impl("quantize",
         [](const Tensor& x, const Tensor& s, const Tensor& o, int64_t qmin, int64_t qmax,
            Block block) { return forward(quantize_args(qmin, qmax, block), x, s, o); });
  m.impl("dequantize", [](const Tensor& x, const Tensor& s, const Tensor& o, Block block) {
    return forward(dequantize_args(block), x, s, o);
  });
  m.impl("quantize_dequantize", [](const Tensor& x, const Tensor& s, const Tensor& o, int64_t qmin,
                                   int64_t qmax, double shift, Block block) {
    return forward(qdq_args(qmin, qmax, shift, block), x, s, o);
  });
  m.impl("quantize_dequantize_range",
         [](const Tensor& x, const Tensor& min, const Tensor& max, int64_t qmin, int64_t qmax,
            bool symmetric, double shift, Block block) {
           return forward(range_args(qmin, qmax, symmetric, shift, block), x, min, max);
         });
  m.impl("quantize_backward", [](const Tensor& g, const Tensor& x, const Tensor& s, const Tensor& o,
                                 int64_t qmin, int64_t qmax, Block block, Mask mask) {
    return backward(quantize_args(qmin, qmax, block), g, x, s, o, mask);
  });
  m.impl("dequantize_backward",
         [](const Tensor& g, const Tensor& x, const Tensor& s, const Tensor& o, Block block,
            Mask mask) { return backward(dequantize_args(block), g, x, s, o, mask); });
  m.impl("quantize_dequantize_backward",
         [](const Tensor& g, const Tensor& x, const Tensor& s, const Tensor& o, int64_t qmin,
            int64_t qmax, double shift, Block block,
            Mask mask) { return backward(qdq_args(qmin, qmax, shift, block), g, x, s, o, mask); });
  m.impl("quantize_dequantize_range_backward",
         [](const Tensor& g, const Tensor& x, const Tensor& min, const Tensor& max, int64_t qmin,
            int64_t qmax, bool symmetric, double shift, Block block, Mask mask) {
           return backward(range_args(qmin, qmax, symmetric, shift, block), g, x, min, max, mask);
         });
}

template <InplaceFn* forward>
void register_inplace(torch::Library& m) {
  m.impl("quantize_dequantize_range_",
         [](Tensor& x, const Tensor& min, const Tensor& max, int64_t qmin, int64_t qmax,
            bool symmetric, double shift, Block block) {
           forward(range_args(qmin, qmax, symmetric, shift, block), x, min, max);
         });
}

// By way of a second tensor.
template <ForwardFn* forward>
void copied_back(const AffineArgs& args, Tensor& input, const Tensor& first, const Tensor& second) {
  input.copy_(forward(args, input, first, second));
}

// ---- range_to_scale_offset ----------------------------------------------------------------------

AffineArgs range_only_args(int64_t qmin, int64_t qmax, bool symmetric) {
  return range_args(qmin, qmax, symmetric, 0.0, std::nullopt);
}

template <class Kernel>
Pair run_range(const AffineArgs& args, const Tensor& min, const Tensor& max, Kernel&& kernel) {
  const Encodings e(args, min, min, max);
  Tensor scale = at::empty(e.first.sizes(), e.first.options());
  Tensor offset = at::empty_like(scale);
  const auto affine = engine_args(args, min, e);
  kernel(&affine, scale.numel(), scale.data_ptr(), offset.data_ptr());
  return {scale, offset};
}

template <class Kernel>
Pair run_range_backward(const AffineArgs& args, const Tensor& grad_scale, const Tensor& grad_offset,
                        const Tensor& min, const Tensor& max, Kernel&& kernel) {
  const Encodings e(args, min, min, max);
  const Encodings g(args, min, grad_scale, grad_offset);
  Tensor grad_min = at::empty(e.first.sizes(), e.first.options());
  Tensor grad_max = at::empty_like(grad_min);
  const auto affine = engine_args(args, min, e);
  kernel(&affine, grad_min.numel(), g.first.const_data_ptr(), g.second.const_data_ptr(),
         grad_min.data_ptr(), grad_max.data_ptr());
  return {grad_min.to(min.scalar_type()), grad_max.to(max.scalar_type())};
}

Pair range_to_scale_offset_cpu(const Tensor& min, const Tensor& max, int64_t qmin, int64_t qmax,
                               bool symmetric) {
  const auto args = range_only_args(qmin, qmax, symmetric);
  return run_range(args, min, max, [](auto... arguments) {
    check_status(rimet_range_to_scale_offset(arguments...), "range_to_scale_offset");
  });
}

Pair range_to_scale_offset_backward_cpu(const Tensor& grad_scale, const Tensor& grad_offset,
                                        const Tensor& min, const Tensor& max, int64_t qmin,
                                        int64_t qmax, bool symmetric) {
  const auto args = range_only_args(qmin, qmax, symmetric);
  return run_range_backward(args, grad_scale, grad_offset, min, max, [](auto... arguments) {
    check_status(rimet_range_to_scale_offset_backward(arguments...), "range_to_scale_offset");
  });
}

Pair range_to_scale_offset_composite(const Tensor& min, const Tensor& max, int64_t qmin,
                                     int64_t qmax, bool symmetric) {
  return range_to_scale_offset_tensor_ops(range_only_args(qmin, qmax, symmetric), min, max);
}

Pair range_to_scale_offset_backward_composite(const Tensor& grad_scale, const Tensor& grad_offset,
                                              const Tensor& min, const Tensor& max, int64_t qmin,
                                              int64_t qmax, bool symmetric) {
  return range_to_scale_offset_backward_tensor_ops(range_only_args(qmin, qmax, symmetric),
                                                   grad_scale, grad_offset, min, max);
}

Pair range_to_scale_offset_cuda(const Tensor& min, const Tensor& max, int64_t qmin, int64_t qmax,
                                bool symmetric) {
  const auto args = range_only_args(qmin, qmax, symmetric);
  CudaCall call(min);
  bool ran = false;
  const Pair result = run_range(args, min, max, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_range_to_scale_offset(call.device(), arguments...),
                   "range_to_scale_offset");
  });
  return ran ? result : range_to_scale_offset_tensor_ops(args, min, max);
}

Pair range_to_scale_offset_backward_cuda(const Tensor& grad_scale, const Tensor& grad_offset,
                                         const Tensor& min, const Tensor& max, int64_t qmin,
                                         int64_t qmax, bool symmetric) {
  const auto args = range_only_args(qmin, qmax, symmetric);
  CudaCall call(min);
  bool ran = false;
  const Pair result =
      run_range_backward(args, grad_scale, grad_offset, min, max, [&](auto... arguments) {
        ran = call.ran(rimet_cuda_range_to_scale_offset_backward(call.device(), arguments...),
                       "range_to_scale_offset");
      });
  return ran ? result
             : range_to_scale_offset_backward_tensor_ops(args, grad_scale, grad_offset, min, max);
}

Pair range_to_scale_offset_meta(const Tensor& min, const Tensor& max, int64_t qmin, int64_t qmax,
                                bool symmetric) {
  const auto type =
      range_args(qmin, qmax, symmetric, 0.0, std::nullopt).compute_type(min.scalar_type());
  const auto options = min.options().dtype(type);
  return {at::empty_symint(min.sym_sizes(), options), at::empty_symint(min.sym_sizes(), options)};
}

Pair range_to_scale_offset_backward_meta(const Tensor&, const Tensor&, const Tensor& min,
                                         const Tensor& max, int64_t, int64_t, bool) {
  return {at::empty_symint(min.sym_sizes(), min.options()),
          at::empty_symint(max.sym_sizes(), max.options())};
}

}  // namespace

void register_affine_cpu(torch::Library& m) {
  register_affine<affine_forward_cpu, affine_backward_cpu>(m);
  register_inplace<affine_forward_inplace_cpu>(m);
  m.impl("range_to_scale_offset", range_to_scale_offset_cpu);
  m.impl("range_to_scale_offset_backward", range_to_scale_offset_backward_cpu);
}

void register_affine_cuda(torch::Library& m) {
  register_affine<affine_forward_cuda, affine_backward_cuda>(m);
  register_inplace<copied_back<affine_forward_cuda>>(m);
  m.impl("range_to_scale_offset", range_to_scale_offset_cuda);
  m.impl("range_to_scale_offset_backward", range_to_scale_offset_backward_cuda);
}

void register_affine_composite(torch::Library& m) {
  register_affine<affine_forward_tensor_ops, affine_backward_tensor_ops>(m);
  register_inplace<copied_back<affine_forward_tensor_ops>>(m);
  m.impl("range_to_scale_offset", range_to_scale_offset_composite);
  m.impl("range_to_scale_offset_backward", range_to_scale_offset_backward_composite);
}

void register_affine_meta(torch::Library& m) {
  register_affine<affine_forward_meta, affine_backward_meta>(m);
  register_inplace<copied_back<affine_forward_meta>>(m);
  m.impl("range_to_scale_offset", range_to_scale_offset_meta);
  m.impl("range_to_scale_offset_backward", range_to_scale_offset_backward_meta);
}

}  // namespace rimet
