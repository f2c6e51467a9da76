// AdaRound: soft rounding, its regularizer, and the fused optimization step. CPU kernels of the
// engine (src/kernels/cpu/adaround.rs), tensor ops for other devices, shapes for Meta, autograd.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"

namespace rimet {
namespace {

// Ends of the stretched sigmoid; as in the kernel.
constexpr double kZeta = 1.1;
constexpr double kGamma = -0.1;

AffineArgs grid_args(const char* name, int64_t qmin, int64_t qmax, Block block) {
  AffineArgs args(name, AffineArgs::kQuantizeDequantize);
  args.qmin = qmin;
  args.qmax = qmax;
  if (block.has_value()) {
    args.block = block->vec();
  }
  return args;
}

// Every tensor stands beside the weights, element by element.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK_VALUE(tensor.sizes() == input.sizes(), "rimet::", op, ": ", name,
                    ": expected the shape of input ", input.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), "rimet::", op, ": ", name,
                   ": expected the dtype of input ", input.scalar_type(), ", got ",
                   tensor.scalar_type());
}

void check_beta(const char* op, double beta) {
  TORCH_CHECK_VALUE(beta >= 1.0 && std::isfinite(beta), "rimet::", op,
                    ": beta: expected a number of at least 1, got ", beta);
}

// ---- kernels: a device's are functions of the engine's arguments, which are the same on all
// -------

template <class Kernel>
Tensor run_forward(const AffineArgs& args, const Tensor& input, const Tensor& alpha,
                   const Tensor& scale, const Tensor& offset, bool soft, Kernel&& kernel) {
  check_like(args.name, "alpha", alpha, input);
  const Encodings encodings(args, input, scale, offset);
  const Tensor x = dense(input);
  const Tensor a = laid_out_as(alpha, x);
  Tensor output = at::empty_like(x);
  const auto affine = engine_args(args, x, encodings);
  const auto view = view_of(x);
  kernel(&affine, &view, a.const_data_ptr(), soft, output.data_ptr());
  return output;
}

template <class Kernel>
Tensor run_backward(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                    const Tensor& alpha, const Tensor& scale, const Tensor& offset,
                    Kernel&& kernel) {
  check_like(args.name, "alpha", alpha, input);
  const Encodings encodings(args, input, scale, offset);
  const Tensor x = dense(input);
  const Tensor a = laid_out_as(alpha, x);
  const Tensor g = laid_out_as(grad, x);
  Tensor grad_alpha = at::empty_like(x);
  const auto affine = engine_args(args, x, encodings);
  const auto view = view_of(x);
  kernel(&affine, &view, a.const_data_ptr(), g.const_data_ptr(), grad_alpha.data_ptr());
  return grad_alpha;
}

// What a step changes, and by how much.
struct StepArgs {
  Tensor &alpha, &exp_avg, &exp_avg_sq, &output;
  int64_t step;
  double learning_rate, reg_param, beta;

  void check(const Tensor& grad, const Tensor& input) const {
    const char* op = "adaround_step_";
    for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"alpha", &alpha},
                                       {"exp_avg", &exp_avg},
                                       {"exp_avg_sq", &exp_avg_sq},
                                       {"output", &output},
                                       {"grad", &grad}}) {
      check_like(op, name, *tensor, input);
    }
    TORCH_CHECK_VALUE(step >= 1, "rimet::", op, ": step: expected 1 or more, got ", step);
    check_beta(op, beta);
  }
};

// Whether two dense tensors of one shape have their elements in one order. The stride of a
// dimension of one element is anything: that of a depthwise convolution's weight differs between
// memory formats.
bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

template <class Kernel>
void run_step(const AffineArgs& args, const StepArgs& s, const Tensor& grad, const Tensor& input,
              const Tensor& scale, const Tensor& offset, Kernel&& kernel) {
  s.check(grad, input);
  for (const Tensor* tensor : {&s.alpha, &s.exp_avg, &s.exp_avg_sq, &s.output}) {
    TORCH_CHECK_VALUE(input.is_non_overlapping_and_dense() && same_order(*tensor, input),
                      "rimet::adaround_step_: expected dense tensors of one layout, got strides ",
                      input.strides(), " and ", tensor->strides());
  }
  const Encodings encodings(args, input, scale, offset);
  const Tensor g = laid_out_as(grad, input);
  const RimetAdaroundStep arguments{
      s.alpha.data_ptr(),  s.exp_avg.data_ptr(), s.exp_avg_sq.data_ptr(),
      s.output.data_ptr(), g.const_data_ptr(),   s.step,
      s.learning_rate,     s.reg_param,          s.beta};
  const auto affine = engine_args(args, input, encodings);
  const auto view = view_of(input);
  kernel(&affine, &view, &arguments);
}

at::ScalarType sum_type(const Tensor& alpha) {
  return alpha.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// An output, and the target that each of its samples is compared with: all of them in order, or
// those that are named.
struct ReconstructionArgs {
  const Tensor &output, &target;
  const std::optional<Tensor>& samples;
  double factor;
  bool relu;

  void check() const {
    const char* op = "rimet::reconstruction_gradient_";
    TORCH_CHECK_VALUE(
        output.dim() >= 1 && output.is_contiguous(), op,
        ": output: expected a contiguous tensor with a dimension for samples, got sizes ",
        output.sizes(), " and strides ", output.strides());
    TORCH_CHECK_TYPE(target.scalar_type() == output.scalar_type(), op,
                     ": target: expected the dtype of output ", output.scalar_type(), ", got ",
                     target.scalar_type());
    auto expected = target.sizes().vec();
    if (samples.has_value()) {
      TORCH_CHECK_TYPE(samples->scalar_type() == at::kLong && samples->dim() == 1, op,
                       ": samples: expected one dimension of int64, got ", samples->sizes(), " of ",
                       samples->scalar_type());
      if (!expected.empty()) {
        expected[0] = samples->size(0);
      }
    }
    TORCH_CHECK_VALUE(output.sizes() == expected, op,
                      ": output: expected the target's samples, shape ", at::IntArrayRef(expected),
                      ", got ", output.sizes());
  }

  int64_t len() const { return output.size(0) == 0 ? 0 : output.numel() / output.size(0); }
  Tensor of_samples() const {
    return samples.has_value() ? target.index_select(0, *samples) : target;
  }
};

// ---- CPU ----------------------------------------------------------------------------------------

Tensor quantize_dequantize_cpu(const Tensor& input, const Tensor& alpha, const Tensor& scale,
                               const Tensor& offset, int64_t qmin, int64_t qmax, bool soft_rounding,
                               Block block) {
  const auto args = grid_args("adaround_quantize_dequantize", qmin, qmax, block);
  return run_forward(args, input, alpha, scale, offset, soft_rounding, [&](auto... arguments) {
    check_status(rimet_adaround_forward(arguments...), args.name);
  });
}

Tensor quantize_dequantize_backward_cpu(const Tensor& grad, const Tensor& input,
                                        const Tensor& alpha, const Tensor& scale,
                                        const Tensor& offset, int64_t qmin, int64_t qmax,
                                        Block block) {
  const auto args = grid_args("adaround_quantize_dequantize_backward", qmin, qmax, block);
  return run_backward(args, grad, input, alpha, scale, offset, [&](auto... arguments) {
    check_status(rimet_adaround_backward(arguments...), args.name);
  });
}

Tensor regularizer_cpu(const Tensor& alpha, double beta) {
  check_beta("adaround_regularizer", beta);
  const Tensor a = dense(alpha);
  double result = 0.0;
  check_status(rimet_adaround_regularizer(a.const_data_ptr(), static_cast<int32_t>(a.scalar_type()),
                                          a.numel(), beta, &result),
               "adaround_regularizer");
  return at::full({}, result, a.options().dtype(sum_type(a)));
}

Tensor regularizer_backward_cpu(const Tensor& grad, const Tensor& alpha, double beta) {
  const Tensor a = dense(alpha);
  Tensor grad_alpha = at::empty_like(a);
  check_status(rimet_adaround_regularizer_backward(
                   a.const_data_ptr(), static_cast<int32_t>(a.scalar_type()), a.numel(), beta,
                   grad.item<double>(), grad_alpha.data_ptr()),
               "adaround_regularizer_backward");
  return grad_alpha;
}

void step_cpu(Tensor& alpha, Tensor& exp_avg, Tensor& exp_avg_sq, Tensor& output,
              const Tensor& grad, const Tensor& input, const Tensor& scale, const Tensor& offset,
              int64_t qmin, int64_t qmax, Block block, int64_t step, double learning_rate,
              double reg_param, double beta) {
  const auto args = grid_args("adaround_step_", qmin, qmax, block);
  const StepArgs s{alpha, exp_avg, exp_avg_sq, output, step, learning_rate, reg_param, beta};
  run_step(args, s, grad, input, scale, offset,
           [&](auto... arguments) { check_status(rimet_adaround_step(arguments...), args.name); });
}

void reconstruction_gradient_cpu(Tensor& output, const Tensor& target,
                                 const std::optional<Tensor>& samples, double factor, bool relu) {
  const ReconstructionArgs args{output, target, samples, factor, relu};
  args.check();
  const bool in_place = target.is_contiguous();
  const Tensor t = in_place ? target : args.of_samples().contiguous();
  const Tensor numbers = in_place && samples.has_value()
                             ? samples->contiguous()
                             : at::arange(output.size(0), at::TensorOptions(at::kLong));
  const int64_t* data = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < t.size(0),
                      "rimet::reconstruction_gradient_: samples: expected numbers below ",
                      t.size(0), ", got ", data[i]);
  }
  check_status(rimet_reconstruction_gradient(output.data_ptr(), t.const_data_ptr(),
                                             static_cast<int32_t>(t.scalar_type()), data,
                                             numbers.numel(), args.len(), factor, relu),
               "reconstruction_gradient_");
}

// ---- tensor ops ---------------------------------------------------------------------------------

// h(alpha) and its derivative.
std::pair<Tensor, Tensor> rectified_sigmoid(const Tensor& alpha, at::ScalarType type) {
  const Tensor sigmoid = at::sigmoid(alpha.to(type));
  const Tensor raw = sigmoid * (kZeta - kGamma) + kGamma;
  const Tensor h = raw.clamp(0, 1);
  const Tensor slope = at::where(raw.eq(h), (kZeta - kGamma) * sigmoid * (1 - sigmoid),
                                 at::zeros({}, raw.options()));
  return {h, slope};
}

// One element of the encoding for each of the input, whatever the block geometry: dequantize of
// zeros at scale 1 gives the offset itself.
Tensor spread(const AffineArgs& args, const Tensor& input, const Tensor& encoding) {
  AffineArgs plain(args.name, AffineArgs::kDequantize);
  plain.block = args.block;
  const Tensor zeros = at::zeros(input.sizes(), encoding.options());
  return affine_forward_tensor_ops(plain, zeros, at::ones_like(encoding), encoding);
}

// Where soft rounding puts the input on its grid, and what the gradient needs.
struct Soft {
  Tensor scale, offset, base, h, slope;

  Soft(const AffineArgs& args, const Tensor& input, const Tensor& alpha, const Tensor& s,
       const Tensor& o) {
    const auto type = args.compute_type(input.scalar_type());
    scale = spread(args, input, s.to(type));
    offset = spread(args, input, o.to(type));
    base = at::floor(input.to(type) / scale);
    std::tie(h, slope) = rectified_sigmoid(alpha, type);
  }
};

Tensor quantize_dequantize_composite(const Tensor& input, const Tensor& alpha, const Tensor& scale,
                                     const Tensor& offset, int64_t qmin, int64_t qmax,
                                     bool soft_rounding, Block block) {
  const auto args = grid_args("adaround_quantize_dequantize", qmin, qmax, block);
  check_like(args.name, "alpha", alpha, input);
  const Soft soft(args, input, alpha, scale, offset);
  const Tensor up = soft_rounding ? soft.h : alpha.ge(0).to(soft.h.scalar_type());
  const Tensor level = (soft.base + up - soft.offset).clamp(qmin, qmax);
  const Tensor y = (level + soft.offset) * soft.scale;
  return at::empty_like(input).copy_(y);
}

Tensor quantize_dequantize_backward_composite(const Tensor& grad, const Tensor& input,
                                              const Tensor& alpha, const Tensor& scale,
                                              const Tensor& offset, int64_t qmin, int64_t qmax,
                                              Block block) {
  const auto args = grid_args("adaround_quantize_dequantize_backward", qmin, qmax, block);
  check_like(args.name, "alpha", alpha, input);
  const Soft soft(args, input, alpha, scale, offset);
  const Tensor level = soft.base + soft.h - soft.offset;
  const Tensor inside = level.ge(qmin).logical_and(level.le(qmax));
  const Tensor slope = grad.to(soft.slope.scalar_type()) * soft.scale * soft.slope;
  const Tensor result = at::where(inside, slope, at::zeros({}, slope.options()));
  return at::empty_like(input).copy_(result);
}

Tensor regularizer_composite(const Tensor& alpha, double beta) {
  check_beta("adaround_regularizer", beta);
  const auto [h, slope] = rectified_sigmoid(alpha, sum_type(alpha));
  return (1 - (2 * h - 1).abs().pow(beta)).sum(at::kDouble).to(sum_type(alpha));
}

Tensor regularizer_backward_composite(const Tensor& grad, const Tensor& alpha, double beta) {
  const auto [h, slope] = rectified_sigmoid(alpha, sum_type(alpha));
  const Tensor u = 2 * h - 1;
  const Tensor result = grad * (-2 * beta) * u.abs().pow(beta - 1) * u.sign() * slope;
  return at::empty_like(alpha).copy_(result);
}

void step_composite(Tensor& alpha, Tensor& exp_avg, Tensor& exp_avg_sq, Tensor& output,
                    const Tensor& grad, const Tensor& input, const Tensor& scale,
                    const Tensor& offset, int64_t qmin, int64_t qmax, Block block, int64_t step,
                    double learning_rate, double reg_param, double beta) {
  StepArgs{alpha, exp_avg, exp_avg_sq, output, step, learning_rate, reg_param, beta}.check(grad,
                                                                                           input);
  Tensor g =
      quantize_dequantize_backward_composite(grad, input, alpha, scale, offset, qmin, qmax, block);
  if (reg_param != 0.0) {
    const Tensor weight = at::full({}, reg_param, alpha.options().dtype(sum_type(alpha)));
    g = g + regularizer_backward_composite(weight, alpha, beta);
  }
  constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kEpsilon = 1e-8;
  exp_avg.mul_(kBeta1).add_(g, 1 - kBeta1);
  exp_avg_sq.mul_(kBeta2).addcmul_(g, g, 1 - kBeta2);
  const double correction = std::sqrt(1 - std::pow(kBeta2, step));
  const Tensor scaled = exp_avg_sq.sqrt() / correction + kEpsilon;
  alpha.addcdiv_(exp_avg, scaled, -learning_rate / (1 - std::pow(kBeta1, step)));
  output.copy_(quantize_dequantize_composite(input, alpha, scale, offset, qmin, qmax,
                                             /*soft_rounding=*/true, block));
}

void reconstruction_gradient_composite(Tensor& output, const Tensor& target,
                                       const std::optional<Tensor>& samples, double factor,
                                       bool relu) {
  const ReconstructionArgs args{output, target, samples, factor, relu};
  args.check();
  const auto type = sum_type(output);
  const Tensor y = output.to(type);
  const Tensor t = args.of_samples().to(type);
  const Tensor gradient = (y - (relu ? at::relu(t) : t)) * factor;
  output.copy_(relu ? at::where(y <= 0, at::zeros({}, y.options()), gradient) : gradient);
}

// ---- CUDA: kernels, and tensor ops where there are none
// -------------------------------------------

// float64 arithmetic over other dtypes (grids beyond 24 bits): too rare for kernels of its own.
bool has_kernel(const AffineArgs& args, const Tensor& input) {
  const auto type = input.scalar_type();
  return type == at::kDouble || args.compute_type(type) != at::kDouble;
}

Tensor quantize_dequantize_cuda(const Tensor& input, const Tensor& alpha, const Tensor& scale,
                                const Tensor& offset, int64_t qmin, int64_t qmax,
                                bool soft_rounding, Block block) {
  const auto args = grid_args("adaround_quantize_dequantize", qmin, qmax, block);
  CudaCall call(input);
  bool ran = false;
  Tensor output;
  if (has_kernel(args, input)) {
    output = run_forward(args, input, alpha, scale, offset, soft_rounding, [&](auto... arguments) {
      ran = call.ran(rimet_cuda_adaround_forward(call.device(), arguments...), args.name);
    });
  }
  return ran ? output
             : quantize_dequantize_composite(input, alpha, scale, offset, qmin, qmax, soft_rounding,
                                             block);
}

Tensor quantize_dequantize_backward_cuda(const Tensor& grad, const Tensor& input,
                                         const Tensor& alpha, const Tensor& scale,
                                         const Tensor& offset, int64_t qmin, int64_t qmax,
                                         Block block) {
  const auto args = grid_args("adaround_quantize_dequantize_backward", qmin, qmax, block);
  CudaCall call(input);
  bool ran = false;
  Tensor grad_alpha;
  if (has_kernel(args, input)) {
    grad_alpha = run_backward(args, grad, input, alpha, scale, offset, [&](auto... arguments) {
      ran = call.ran(rimet_cuda_adaround_backward(call.device(), arguments...), args.name);
    });
  }
  return ran ? grad_alpha
             : quantize_dequantize_backward_composite(grad, input, alpha, scale, offset, qmin, qmax,
                                                      block);
}

Tensor regularizer_cuda(const Tensor& alpha, double beta) {
  check_beta("adaround_regularizer", beta);
  CudaCall call(alpha);
  const Tensor a = dense(alpha);
  Tensor result = at::empty({}, a.options().dtype(sum_type(a)));
  const bool ran = call.ran(rimet_cuda_adaround_regularizer(call.device(), a.const_data_ptr(),
                                                            static_cast<int32_t>(a.scalar_type()),
                                                            a.numel(), beta, result.data_ptr()),
                            "adaround_regularizer");
  return ran ? result : regularizer_composite(alpha, beta);
}

Tensor regularizer_backward_cuda(const Tensor& grad, const Tensor& alpha, double beta) {
  CudaCall call(alpha);
  const Tensor a = dense(alpha);
  const Tensor g = grad.to(sum_type(a));
  Tensor grad_alpha = at::empty_like(a);
  const bool ran =
      call.ran(rimet_cuda_adaround_regularizer_backward(
                   call.device(), a.const_data_ptr(), static_cast<int32_t>(a.scalar_type()),
                   a.numel(), beta, g.const_data_ptr(), grad_alpha.data_ptr()),
               "adaround_regularizer_backward");
  return ran ? grad_alpha : regularizer_backward_composite(grad, alpha, beta);
}

void step_cuda(Tensor& alpha, Tensor& exp_avg, Tensor& exp_avg_sq, Tensor& output,
               const Tensor& grad, const Tensor& input, const Tensor& scale, const Tensor& offset,
               int64_t qmin, int64_t qmax, Block block, int64_t step, double learning_rate,
               double reg_param, double beta) {
  const auto args = grid_args("adaround_step_", qmin, qmax, block);
  const StepArgs s{alpha, exp_avg, exp_avg_sq, output, step, learning_rate, reg_param, beta};
  CudaCall call(input);
  bool ran = false;
  if (has_kernel(args, input)) {
    run_step(args, s, grad, input, scale, offset, [&](auto... arguments) {
      ran = call.ran(rimet_cuda_adaround_step(call.device(), arguments...), args.name);
    });
  }
  if (!ran) {
    step_composite(alpha, exp_avg, exp_avg_sq, output, grad, input, scale, offset, qmin, qmax,
                   block, step, learning_rate, reg_param, beta);
  }
}

void reconstruction_gradient_cuda(Tensor& output, const Tensor& target,
                                  const std::optional<Tensor>& samples, double factor, bool relu) {
  const ReconstructionArgs args{output, target, samples, factor, relu};
  args.check();
  CudaCall call(output);
  const Tensor t = args.of_samples().contiguous();
  const bool ran =
      call.ran(rimet_cuda_reconstruction_gradient(
                   call.device(), output.data_ptr(), t.const_data_ptr(),
                   static_cast<int32_t>(t.scalar_type()), output.numel(), factor, relu),
               "reconstruction_gradient_");
  if (!ran) {
    reconstruction_gradient_composite(output, target, samples, factor, relu);
  }
}

// ---- Meta ---------------------------------------------------------------------------------------

Tensor quantize_dequantize_meta(const Tensor& input, const Tensor& alpha, const Tensor& scale,
                                const Tensor& offset, int64_t qmin, int64_t qmax, bool,
                                Block block) {
  const auto args = grid_args("adaround_quantize_dequantize", qmin, qmax, block);
  return affine_forward_meta(args, input, scale, offset);
}

Tensor quantize_dequantize_backward_meta(const Tensor&, const Tensor& input, const Tensor&,
                                         const Tensor&, const Tensor&, int64_t, int64_t, Block) {
  return at::empty_like(input);
}

Tensor regularizer_meta(const Tensor& alpha, double) {
  return at::empty({}, alpha.options().dtype(sum_type(alpha)));
}

Tensor regularizer_backward_meta(const Tensor&, const Tensor& alpha, double) {
  return at::empty_like(alpha);
}

void step_meta(Tensor&, Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
               const Tensor&, int64_t, int64_t, Block, int64_t, double, double, double) {}

void reconstruction_gradient_meta(Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                                  bool) {}

// ---- autograd -----------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Weights, scale and offset are constants of the rounding problem: only alpha gets a gradient.
struct QuantizeDequantize : torch::autograd::Function<QuantizeDequantize> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& alpha,
                        const Tensor& scale, const Tensor& offset, int64_t qmin, int64_t qmax,
                        const std::optional<std::vector<int64_t>>& block) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, alpha, scale, offset});
    context->saved_data["qmin"] = qmin;
    context->saved_data["qmax"] = qmax;
    context->saved_data["block"] = block;
    return op().call(input, alpha, scale, offset, qmin, qmax, true, as_ref(block));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, int64_t, int64_t, Block);
    static auto handle = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rimet::adaround_quantize_dequantize_backward", "")
                             .typed<Signature>();
    const auto saved = context->get_saved_variables();
    const auto block = context->saved_data["block"].toOptional<std::vector<int64_t>>();
    variable_list result(7);
    result[1] = handle.call(grads[0], saved[0], saved[1], saved[2], saved[3],
                            context->saved_data["qmin"].toInt(),
                            context->saved_data["qmax"].toInt(), as_ref(block));
    return result;
  }

  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                           int64_t, bool, Block);
  static const c10::TypedOperatorHandle<Signature>& op() {
    static auto handle = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rimet::adaround_quantize_dequantize", "")
                             .typed<Signature>();
    return handle;
  }

  static Block as_ref(const std::optional<std::vector<int64_t>>& block) {
    return block ? Block(at::IntArrayRef(*block)) : Block(std::nullopt);
  }
};

Tensor quantize_dequantize_autograd(const Tensor& input, const Tensor& alpha, const Tensor& scale,
                                    const Tensor& offset, int64_t qmin, int64_t qmax,
                                    bool soft_rounding, Block block) {
  if (!(soft_rounding && at::GradMode::is_enabled() && alpha.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return QuantizeDequantize::op().call(input, alpha, scale, offset, qmin, qmax, soft_rounding,
                                         block);
  }
  std::optional<std::vector<int64_t>> copy;
  if (block.has_value()) {
    copy = block->vec();
  }
  return QuantizeDequantize::apply(input, alpha, scale, offset, qmin, qmax, copy);
}

struct Regularizer : torch::autograd::Function<Regularizer> {
  static const c10::TypedOperatorHandle<Tensor(const Tensor&, double)>& op() {
    static auto handle = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rimet::adaround_regularizer", "")
                             .typed<Tensor(const Tensor&, double)>();
    return handle;
  }

  static Tensor forward(AutogradContext* context, const Tensor& alpha, double beta) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({alpha});
    context->saved_data["beta"] = beta;
    return op().call(alpha, beta);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static auto handle = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rimet::adaround_regularizer_backward", "")
                             .typed<Tensor(const Tensor&, const Tensor&, double)>();
    return {handle.call(grads[0], context->get_saved_variables()[0],
                        context->saved_data["beta"].toDouble()),
            Tensor()};
  }
};

Tensor regularizer_autograd(const Tensor& alpha, double beta) {
  if (!(at::GradMode::is_enabled() && alpha.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Regularizer::op().call(alpha, beta);
  }
  return Regularizer::apply(alpha, beta);
}

}  // namespace

// The functions of one kind of device.
#define RIMET_REGISTER_ADAROUND(device)                                                     \
  void register_adaround_##device(torch::Library& m) {                                      \
    m.impl("adaround_quantize_dequantize", quantize_dequantize_##device);                   \
    m.impl("adaround_quantize_dequantize_backward", quantize_dequantize_backward_##device); \
    m.impl("adaround_regularizer", regularizer_##device);                                   \
    m.impl("adaround_regularizer_backward", regularizer_backward_##device);                 \
    m.impl("adaround_step_", step_##device);                                                \
    m.impl("reconstruction_gradient_", reconstruction_gradient_##device);                   \
  }
RIMET_REGISTER_ADAROUND(cpu)
RIMET_REGISTER_ADAROUND(cuda)
RIMET_REGISTER_ADAROUND(composite)
RIMET_REGISTER_ADAROUND(meta)
#undef RIMET_REGISTER_ADAROUND

void register_adaround_autograd(torch::Library& m) {
  m.impl("adaround_quantize_dequantize", quantize_dequantize_autograd);
  m.impl("adaround_regularizer", regularizer_autograd);
}

}  // namespace rimet
