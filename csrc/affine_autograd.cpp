// Autograd for the affine ops: the backward pass recomputes what it needs from the input.

#include "autograd.h"

namespace rimet {
namespace {

// Plain arguments as the op takes them.
template <class T>
const T& argument(const T& value) {
  return value;
}
Block argument(const std::optional<std::vector<int64_t>>& block) { return as_ref(block); }

// What autograd needs of an op: its handle, its backward's handle, and its plain arguments as a
// tuple. The block size comes last.
template <class Op>
struct Function : torch::autograd::Function<Function<Op>> {
  template <class... Plain>
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& first,
                        const Tensor& second, const Plain&... plain) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, first, second});
    int i = 0;
    ((context->saved_data[std::to_string(i++)] = plain), ...);
    return Op::forward().call(input, first, second, argument(plain)...);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Mask mask = {context->needs_input_grad(0), context->needs_input_grad(1),
                       context->needs_input_grad(2)};
    auto [x, a, b] = Op::backward(*context, grads[0], saved[0], saved[1], saved[2], mask);
    variable_list result{x, a, b};
    result.resize(3 + Op::kPlain);
    return result;
  }
};

using QuantizeSig = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, Block);
using DequantizeSig = Tensor(const Tensor&, const Tensor&, const Tensor&, Block);
using QdqSig = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double, Block);
using RangeSig = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, double,
                        Block);

struct QuantizeOp {
  static constexpr size_t kPlain = 3;
  static auto& forward() { return RIMET_HANDLE("quantize", QuantizeSig); }
  static Grads backward(AutogradContext& c, const Tensor& g, const Tensor& x, const Tensor& s,
                        const Tensor& o, Mask mask) {
    auto& handle =
        RIMET_HANDLE("quantize_backward", Grads(const Tensor&, const Tensor&, const Tensor&,
                                                const Tensor&, int64_t, int64_t, Block, Mask));
    const auto block = saved_block(c, "2");
    return handle.call(g, x, s, o, c.saved_data["0"].toInt(), c.saved_data["1"].toInt(),
                       as_ref(block), mask);
  }
};

struct DequantizeOp {
  static constexpr size_t kPlain = 1;
  static auto& forward() { return RIMET_HANDLE("dequantize", DequantizeSig); }
  static Grads backward(AutogradContext& c, const Tensor& g, const Tensor& x, const Tensor& s,
                        const Tensor& o, Mask mask) {
    auto& handle = RIMET_HANDLE(
        "dequantize_backward",
        Grads(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Block, Mask));
    const auto block = saved_block(c, "0");
    return handle.call(g, x, s, o, as_ref(block), mask);
  }
};

struct QdqOp {
  static constexpr size_t kPlain = 4;
  static auto& forward() { return RIMET_HANDLE("quantize_dequantize", QdqSig); }
  static Grads backward(AutogradContext& c, const Tensor& g, const Tensor& x, const Tensor& s,
                        const Tensor& o, Mask mask) {
    auto& handle = RIMET_HANDLE("quantize_dequantize_backward",
                                Grads(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      int64_t, int64_t, double, Block, Mask));
    const auto block = saved_block(c, "3");
    return handle.call(g, x, s, o, c.saved_data["0"].toInt(), c.saved_data["1"].toInt(),
                       c.saved_data["2"].toDouble(), as_ref(block), mask);
  }
};

struct RangeOp {
  static constexpr size_t kPlain = 5;
  static auto& forward() { return RIMET_HANDLE("quantize_dequantize_range", RangeSig); }
  static Grads backward(AutogradContext& c, const Tensor& g, const Tensor& x, const Tensor& min,
                        const Tensor& max, Mask mask) {
    auto& handle = RIMET_HANDLE("quantize_dequantize_range_backward",
                                Grads(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      int64_t, int64_t, bool, double, Block, Mask));
    const auto block = saved_block(c, "4");
    return handle.call(g, x, min, max, c.saved_data["0"].toInt(), c.saved_data["1"].toInt(),
                       c.saved_data["2"].toBool(), c.saved_data["3"].toDouble(), as_ref(block),
                       mask);
  }
};

// The entry point of an op at the Autograd key. Without a gradient to record it goes straight on.
template <class Op, class... Plain>
Tensor autograd(const Tensor& input, const Tensor& first, const Tensor& second, Plain... plain,
                Block block) {
  if (!wants_grad(input, first, second)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Op::forward().call(input, first, second, plain..., block);
  }
  std::optional<std::vector<int64_t>> copy;
  if (block.has_value()) {
    copy = block->vec();
  }
  return Function<Op>::apply(input, first, second, plain..., copy);
}

struct RangeToScaleOffset : torch::autograd::Function<RangeToScaleOffset> {
  using Pair = std::tuple<Tensor, Tensor>;
  static auto& op() {
    return RIMET_HANDLE("range_to_scale_offset",
                        Pair(const Tensor&, const Tensor&, int64_t, int64_t, bool));
  }

  static variable_list forward(AutogradContext* context, const Tensor& min, const Tensor& max,
                               int64_t qmin, int64_t qmax, bool symmetric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({min, max});
    context->saved_data["qmin"] = qmin;
    context->saved_data["qmax"] = qmax;
    context->saved_data["symmetric"] = symmetric;
    auto [scale, offset] = op().call(min, max, qmin, qmax, symmetric);
    if (symmetric) {
      context->mark_non_differentiable({offset});  // a constant
    }
    return {scale, offset};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& handle = RIMET_HANDLE(
        "range_to_scale_offset_backward",
        Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool));
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const auto grad = [&](size_t i) {
      return grads[i].defined() ? grads[i] : at::zeros_like(saved[0]);
    };
    auto [min, max] = handle.call(grad(0), grad(1), saved[0], saved[1], data["qmin"].toInt(),
                                  data["qmax"].toInt(), data["symmetric"].toBool());
    return {min, max, Tensor(), Tensor(), Tensor()};
  }
};

RangeToScaleOffset::Pair range_to_scale_offset(const Tensor& min, const Tensor& max, int64_t qmin,
                                               int64_t qmax, bool symmetric) {
  if (!wants_grad(min, max)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return RangeToScaleOffset::op().call(min, max, qmin, qmax, symmetric);
  }
  auto result = RangeToScaleOffset::apply(min, max, qmin, qmax, symmetric);
  return {result[0], result[1]};
}

// For tensors that nobody wants gradients of: those before and after the write are one.
void quantize_dequantize_range_inplace(Tensor& input, const Tensor& min, const Tensor& max,
                                       int64_t qmin, int64_t qmax, bool symmetric, double shift,
                                       Block block) {
  TORCH_CHECK(!wants_grad(input, min, max),
              "rimet::quantize_dequantize_range_: the derivative is not implemented: expected no "
              "tensor that requires a gradient, or torch.no_grad(); quantize_dequantize_range has "
              "one");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    RIMET_HANDLE("quantize_dequantize_range_",
                 void(Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool, double, Block))
        .call(input, min, max, qmin, qmax, symmetric, shift, block);
  }
  input.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

void register_affine_autograd(torch::Library& m) {
  m.impl("quantize", autograd<QuantizeOp, int64_t, int64_t>);
  m.impl("dequantize", autograd<DequantizeOp>);
  m.impl("quantize_dequantize", autograd<QdqOp, int64_t, int64_t, double>);
  m.impl("quantize_dequantize_range", autograd<RangeOp, int64_t, int64_t, bool, double>);
  m.impl("quantize_dequantize_range_", quantize_dequantize_range_inplace);
  m.impl("range_to_scale_offset", range_to_scale_offset);
}

}  // namespace rimet
