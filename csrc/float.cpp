// float_quantize, float_quantize_dequantize: the engine's kernels on CPU and CUDA, plain tensor ops
// for devices without kernels of their own, shapes for Meta, and the backward pass, which
// recomputes what it needs from the input.

#include "autograd.h"

namespace rimet {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using PairMask = std::array<bool, 2>;

// A float op's arguments beside its tensors.
struct FloatArgs {
  bool dequantize;
  int64_t exponent_bits;
  int64_t mantissa_bits;
  bool finite;
  bool unsigned_zero;
  std::optional<std::vector<int64_t>> block;

  const char* name() const { return dequantize ? "float_quantize_dequantize" : "float_quantize"; }

  // What the engine knows of the format.
  struct Limits {
    double max;
    int32_t min_exponent;
    int32_t fits_f32;
  };
  Limits limits() const {
    Limits l{};
    const auto args = engine_args(at::kFloat, {}, nullptr);
    check_status(rimet_float_format(&args, &l.max, &l.min_exponent, &l.fits_f32), name());
    return l;
  }

  // float64 input, and formats that float32 cannot hold, are computed in float64.
  at::ScalarType compute_type(at::ScalarType input) const {
    return input == at::kDouble || !limits().fits_f32 ? at::kDouble : at::kFloat;
  }

  RimetFloat engine_args(at::ScalarType compute, at::IntArrayRef encoding,
                         const void* scale) const {
    RimetFloat a{};
    a.scale = scale;
    a.encoding = encoding.data();
    a.encoding_ndim = static_cast<int64_t>(encoding.size());
    a.block = block ? block->data() : nullptr;
    a.block_len = block ? static_cast<int64_t>(block->size()) : -1;
    a.exponent_bits = exponent_bits;
    a.mantissa_bits = mantissa_bits;
    a.finite = finite;
    a.unsigned_zero = unsigned_zero;
    a.dequantize = dequantize;
    a.double_compute = compute == at::kDouble;
    return a;
  }
};

// The scale as a contiguous tensor of the compute type.
Tensor checked_scale(const FloatArgs& args, const Tensor& input, const Tensor& scale) {
  TORCH_CHECK(scale.device() == input.device(), "rimet::", args.name(),
              ": scale: expected the input's device ", input.device(), ", got ", scale.device());
  TORCH_CHECK_TYPE(at::isFloatingType(scale.scalar_type()), "rimet::", args.name(),
                   ": scale: expected a floating-point tensor, got ", scale.scalar_type());
  return scale.to(args.compute_type(input.scalar_type())).contiguous();
}

// ---- the engine's kernels
// -----------------------------------------------------------------------

// kernel: a device's, as a function of the engine's arguments, which are the same on all.

template <class Kernel>
Tensor run_forward(const FloatArgs& args, const Tensor& input, const Tensor& scale,
                   Kernel&& kernel) {
  const Tensor s = checked_scale(args, input, scale);
  const Tensor x = dense(input);
  Tensor output = result_like(x);
  const auto engine = args.engine_args(s.scalar_type(), s.sizes(), s.const_data_ptr());
  const auto view = view_of(x);
  kernel(&engine, &view, output.data_ptr());
  return output;
}

template <class Kernel>
Pair run_backward(const FloatArgs& args, const Tensor& grad, const Tensor& input,
                  const Tensor& scale, PairMask mask, Kernel&& kernel) {
  const Tensor s = checked_scale(args, input, scale);
  const Tensor x = dense(input);
  const Tensor g = laid_out_as(grad, x);
  Tensor grad_input = mask[0] ? result_like(x) : Tensor();
  Tensor grad_scale = mask[1] ? at::empty_like(s) : Tensor();
  const auto engine = args.engine_args(s.scalar_type(), s.sizes(), s.const_data_ptr());
  const auto view = view_of(x);
  kernel(&engine, &view, g.data_ptr(), mask[0] ? grad_input.data_ptr() : nullptr,
         mask[1] ? grad_scale.data_ptr() : nullptr);
  return {grad_input, mask[1] ? grad_scale.to(scale.scalar_type()) : Tensor()};
}

Tensor forward_cpu(const FloatArgs& args, const Tensor& input, const Tensor& scale) {
  return run_forward(args, input, scale, [&](auto... arguments) {
    check_status(rimet_float_forward(arguments...), args.name());
  });
}

Pair backward_cpu(const FloatArgs& args, const Tensor& grad, const Tensor& input,
                  const Tensor& scale, PairMask mask) {
  return run_backward(args, grad, input, scale, mask, [&](auto... arguments) {
    check_status(rimet_float_backward(arguments...), args.name());
  });
}

Tensor forward_tensor_ops(const FloatArgs&, const Tensor& input, const Tensor& scale);
Pair backward_tensor_ops(const FloatArgs&, const Tensor& grad, const Tensor& input,
                         const Tensor& scale, PairMask);

// float64 arithmetic over other dtypes (formats that float32 does not hold) goes by way of float64
// tensors: too rare for kernels of its own.

Tensor forward_cuda(const FloatArgs& args, const Tensor& input, const Tensor& scale) {
  const auto type = input.scalar_type();
  if (type != at::kDouble && args.compute_type(type) == at::kDouble) {
    return forward_cuda(args, input.to(at::kDouble), scale).to(type);
  }
  CudaCall call(input);
  bool ran = false;
  const Tensor output = run_forward(args, input, scale, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_float_forward(call.device(), arguments...), args.name());
  });
  return ran ? output : forward_tensor_ops(args, input, scale);
}

Pair backward_cuda(const FloatArgs& args, const Tensor& grad, const Tensor& input,
                   const Tensor& scale, PairMask mask) {
  const auto type = input.scalar_type();
  if (type != at::kDouble && args.compute_type(type) == at::kDouble) {
    auto [x, s] = backward_cuda(args, grad.to(at::kDouble), input.to(at::kDouble), scale, mask);
    return {mask[0] ? x.to(type) : x, s};
  }
  CudaCall call(input);
  bool ran = false;
  const Pair grads = run_backward(args, grad, input, scale, mask, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_float_backward(call.device(), arguments...), args.name());
  });
  return ran ? grads : backward_tensor_ops(args, grad, input, scale, mask);
}

// ---- plain tensor ops: the same operations in the same order as src/kernels/cpu/float.rs
// ---------

struct Prepared {
  Blocks blocks;
  FloatArgs::Limits limits;
  Tensor ratio, scale;

  Prepared(const FloatArgs& args, const Tensor& input, const Tensor& given)
      : blocks(args.name(), input.sizes(), given.sizes(), args.block), limits(args.limits()) {
    scale = checked_scale(args, input, given).reshape(blocks.encoding);
    ratio = input.to(scale.scalar_type()).reshape(blocks.shape) / scale;
  }
};

Tensor nearest(const FloatArgs& args, const Prepared& p) {
  const bool wide = p.ratio.scalar_type() == at::kDouble;
  const int64_t dropped = (wide ? 52 : 23) - args.mantissa_bits;
  const int64_t sign_mask =
      wide ? std::numeric_limits<int64_t>::min() : int64_t{std::numeric_limits<int32_t>::min()};
  const int64_t kept = ~sign_mask & ~((int64_t{1} << dropped) - 1);
  const int64_t below_half = ((int64_t{1} << dropped) - 1) >> 1;
  const double finest = std::ldexp(1.0, p.limits.min_exponent + static_cast<int>(dropped));

  const Tensor bits = p.ratio.view(wide ? at::kLong : at::kInt);
  const Tensor sign = bits.bitwise_and(sign_mask);
  const Tensor magnitude_bits = bits.bitwise_and(~sign_mask);
  Tensor odd = magnitude_bits.bitwise_right_shift(dropped);
  odd = args.mantissa_bits == 0 ? at::ones_like(odd) : odd.bitwise_and(dropped > 0 ? 1 : 0);
  const Tensor normal =
      (magnitude_bits + (odd + below_half)).bitwise_and(kept).view(p.ratio.scalar_type());
  const Tensor magnitude = p.ratio.abs();
  const Tensor subnormal = (magnitude + finest) - finest;
  const Tensor rounded =
      at::where(magnitude < std::ldexp(1.0, p.limits.min_exponent), subnormal, normal)
          .clamp_max(p.limits.max);
  const Tensor value =
      rounded.view(bits.scalar_type()).bitwise_or(sign).view(rounded.scalar_type()) +
      (args.unsigned_zero ? 0.0 : -0.0);
  return at::where(p.ratio.isnan(), p.ratio, value);
}

Tensor forward_tensor_ops(const FloatArgs& args, const Tensor& input, const Tensor& scale) {
  const Prepared p(args, input, scale);
  const Tensor value = nearest(args, p);
  const Tensor result = args.dequantize ? value * p.scale : value;
  return at::empty_like(input).copy_(result.reshape(input.sizes()));
}

Pair backward_tensor_ops(const FloatArgs& args, const Tensor& grad, const Tensor& input,
                         const Tensor& scale, PairMask mask) {
  const Prepared p(args, input, scale);
  const Tensor g = grad.to(p.ratio.scalar_type()).reshape(p.blocks.shape);
  const Tensor zero = at::zeros({}, g.options());
  const Tensor inside = p.ratio.abs() <= p.limits.max;
  Tensor gx, gs;
  if (args.dequantize) {
    const Tensor value = nearest(args, p);
    gx = at::where(inside, g, zero);
    gs = g * at::where(inside, value - p.ratio, value);
  } else {
    gx = at::where(inside, g / p.scale, zero);
    gs = at::where(inside, -(gx * p.ratio), zero);
  }
  return {mask[0] ? at::empty_like(input).copy_(gx.reshape(input.sizes())) : Tensor(),
          mask[1] ? gs.sum_to_size(p.blocks.encoding).reshape(scale.sizes()).to(scale.scalar_type())
                  : Tensor()};
}

// ---- Meta ---------------------------------------------------------------------------------------

Tensor forward_meta(const FloatArgs& args, const Tensor& input, const Tensor& scale) {
  const auto symbolic = [](const Tensor& t) {
    return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (!symbolic(input) && !symbolic(scale)) {
    const auto engine = args.engine_args(at::kFloat, scale.sizes(), nullptr);
    const RimetView view{nullptr, input.sizes().data(), input.strides().data(), input.dim(),
                         static_cast<int32_t>(input.scalar_type())};
    check_status(rimet_float_check(&engine, &view), args.name());
  }
  return at::empty_like(input);
}

Pair backward_meta(const FloatArgs&, const Tensor&, const Tensor& input, const Tensor& scale,
                   PairMask mask) {
  return {mask[0] ? at::empty_like(input) : Tensor(),
          mask[1] ? at::empty_like(scale, at::MemoryFormat::Contiguous) : Tensor()};
}

// ---- registration -------------------------------------------------------------------------------

using ForwardFn = Tensor(const FloatArgs&, const Tensor&, const Tensor&);
using BackwardFn = Pair(const FloatArgs&, const Tensor&, const Tensor&, const Tensor&, PairMask);

template <bool dequantize, ForwardFn* forward>
Tensor forward_op(const Tensor& input, const Tensor& scale, int64_t exponent_bits,
                  int64_t mantissa_bits, bool finite, bool unsigned_zero, Block block) {
  return forward({dequantize, exponent_bits, mantissa_bits, finite, unsigned_zero, copy(block)},
                 input, scale);
}

template <bool dequantize, BackwardFn* backward>
Pair backward_op(const Tensor& grad, const Tensor& input, const Tensor& scale,
                 int64_t exponent_bits, int64_t mantissa_bits, bool finite, bool unsigned_zero,
                 Block block, PairMask mask) {
  return backward({dequantize, exponent_bits, mantissa_bits, finite, unsigned_zero, copy(block)},
                  grad, input, scale, mask);
}

// Both ops and their backward passes for one kind of device.
template <ForwardFn* forward, BackwardFn* backward>
void register_float(torch::Library& m) {
  m.impl("float_quantize", forward_op<false, forward>);
  m.impl("float_quantize_dequantize", forward_op<true, forward>);
  m.impl("float_quantize_backward", backward_op<false, backward>);
  m.impl("float_quantize_dequantize_backward", backward_op<true, backward>);
}

// ---- Autograd -----------------------------------------------------------------------------------

using ForwardSig = Tensor(const Tensor&, const Tensor&, int64_t, int64_t, bool, bool, Block);
using BackwardSig = Pair(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, bool,
                         Block, PairMask);

template <bool dequantize>
struct FloatFunction : torch::autograd::Function<FloatFunction<dequantize>> {
  static auto& op() {
    if constexpr (dequantize) {
      return RIMET_HANDLE("float_quantize_dequantize", ForwardSig);
    } else {
      return RIMET_HANDLE("float_quantize", ForwardSig);
    }
  }

  static auto& backward_op() {
    if constexpr (dequantize) {
      return RIMET_HANDLE("float_quantize_dequantize_backward", BackwardSig);
    } else {
      return RIMET_HANDLE("float_quantize_backward", BackwardSig);
    }
  }

  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& scale,
                        int64_t exponent_bits, int64_t mantissa_bits, bool finite,
                        bool unsigned_zero, const std::optional<std::vector<int64_t>>& block) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, scale});
    auto& data = context->saved_data;
    data["exponent_bits"] = exponent_bits;
    data["mantissa_bits"] = mantissa_bits;
    data["finite"] = finite;
    data["unsigned_zero"] = unsigned_zero;
    data["block_size"] = block;
    return op().call(input, scale, exponent_bits, mantissa_bits, finite, unsigned_zero,
                     as_ref(block));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const auto block = saved_block(*context, "block_size");
    auto [input, scale] = backward_op().call(
        grads[0], saved[0], saved[1], data["exponent_bits"].toInt(), data["mantissa_bits"].toInt(),
        data["finite"].toBool(), data["unsigned_zero"].toBool(), as_ref(block),
        {context->needs_input_grad(0), context->needs_input_grad(1)});
    return {input, scale, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

template <bool dequantize>
Tensor autograd(const Tensor& input, const Tensor& scale, int64_t exponent_bits,
                int64_t mantissa_bits, bool finite, bool unsigned_zero, Block block) {
  using F = FloatFunction<dequantize>;
  if (!wants_grad(input, scale)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return F::op().call(input, scale, exponent_bits, mantissa_bits, finite, unsigned_zero, block);
  }
  return F::apply(input, scale, exponent_bits, mantissa_bits, finite, unsigned_zero, copy(block));
}

}  // namespace

void register_float_cpu(torch::Library& m) { register_float<forward_cpu, backward_cpu>(m); }
void register_float_cuda(torch::Library& m) { register_float<forward_cuda, backward_cuda>(m); }
void register_float_composite(torch::Library& m) {
  register_float<forward_tensor_ops, backward_tensor_ops>(m);
}
void register_float_meta(torch::Library& m) { register_float<forward_meta, backward_meta>(m); }
void register_float_autograd(torch::Library& m) {
  m.impl("float_quantize", autograd<false>);
  m.impl("float_quantize_dequantize", autograd<true>);
}

}  // namespace rimet
