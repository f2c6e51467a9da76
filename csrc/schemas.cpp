// Every op of the namespace `rimet`, and its registration.
//
// TORCH_LIBRARY would abort the process if a second library with the same namespace were loaded;
// the Python extension and librimet.so must be able to meet, so registration is a function that
// does nothing when the ops are there already.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <mutex>

#include "ops.h"

#ifndef RIMET_VERSION
#error "RIMET_VERSION is given by build.rs"
#endif

namespace rimet {
namespace {

const char* const kSchemas[] = {
    "quantize(Tensor input, Tensor scale, Tensor offset, int qmin, int qmax, int[]? "
    "block_size=None)"
    " -> Tensor",
    "dequantize(Tensor input, Tensor scale, Tensor offset, int[]? block_size=None) -> Tensor",
    "quantize_dequantize(Tensor input, Tensor scale, Tensor offset, int qmin, int qmax,"
    " float zero_point_shift=0., int[]? block_size=None) -> Tensor",
    "quantize_dequantize_range(Tensor input, Tensor min, Tensor max, int qmin, int qmax,"
    " bool symmetric, float zero_point_shift=0., int[]? block_size=None) -> Tensor",
    "quantize_dequantize_range_(Tensor(a!) input, Tensor min, Tensor max, int qmin, int qmax,"
    " bool symmetric, float zero_point_shift=0., int[]? block_size=None) -> ()",
    "range_to_scale_offset(Tensor min, Tensor max, int qmin, int qmax, bool symmetric)"
    " -> (Tensor scale, Tensor offset)",
    "min_max(Tensor input, int[] shape, int[]? block_size=None) -> (Tensor min, Tensor max)",
    "float_quantize(Tensor input, Tensor scale, int exponent_bits, int mantissa_bits,"
    " bool finite=False, bool unsigned_zero=False, int[]? block_size=None) -> Tensor",
    "float_quantize_dequantize(Tensor input, Tensor scale, int exponent_bits, int mantissa_bits,"
    " bool finite=False, bool unsigned_zero=False, int[]? block_size=None) -> Tensor",
    "grouped_block_scale(Tensor scale, int[] block_grouping, int levels)"
    " -> (Tensor scale, Tensor group_scale)",
    // The backward passes. output_mask says which gradients are wanted.
    "quantize_backward(Tensor grad, Tensor input, Tensor scale, Tensor offset, int qmin, int qmax,"
    " int[]? block_size, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "dequantize_backward(Tensor grad, Tensor input, Tensor scale, Tensor offset, int[]? block_size,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "quantize_dequantize_backward(Tensor grad, Tensor input, Tensor scale, Tensor offset, int qmin,"
    " int qmax, float zero_point_shift, int[]? block_size, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    "quantize_dequantize_range_backward(Tensor grad, Tensor input, Tensor min, Tensor max, int "
    "qmin,"
    " int qmax, bool symmetric, float zero_point_shift, int[]? block_size, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    "range_to_scale_offset_backward(Tensor grad_scale, Tensor grad_offset, Tensor min, Tensor max,"
    " int qmin, int qmax, bool symmetric) -> (Tensor, Tensor)",
    "float_quantize_backward(Tensor grad, Tensor input, Tensor scale, int exponent_bits,"
    " int mantissa_bits, bool finite, bool unsigned_zero, int[]? block_size, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    "float_quantize_dequantize_backward(Tensor grad, Tensor input, Tensor scale, int exponent_bits,"
    " int mantissa_bits, bool finite, bool unsigned_zero, int[]? block_size, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    "grouped_block_scale_backward(Tensor grad_scale, Tensor grad_group_scale, Tensor scale,"
    " int[] block_grouping, int levels) -> Tensor",
    // AdaRound: weights with a learned rounding, its regularizer, and one fused optimization step.
    "adaround_quantize_dequantize(Tensor input, Tensor alpha, Tensor scale, Tensor offset, int "
    "qmin, int qmax, bool soft_rounding=True, int[]? block_size=None) -> Tensor",
    "adaround_quantize_dequantize_backward(Tensor grad, Tensor input, Tensor alpha, Tensor scale,"
    " Tensor offset, int qmin, int qmax, int[]? block_size) -> Tensor",
    "adaround_regularizer(Tensor alpha, float beta) -> Tensor",
    "adaround_regularizer_backward(Tensor grad, Tensor alpha, float beta) -> Tensor",
    "adaround_step_(Tensor(a!) alpha, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) output,"
    " Tensor grad, Tensor input, Tensor scale, Tensor offset, int qmin, int qmax, int[]? "
    "block_size,"
    " *, int step, float learning_rate, float reg_param, float beta) -> ()",
    // The gradient of the reconstruction loss with respect to a layer's output, in its place.
    "reconstruction_gradient_(Tensor(a!) output, Tensor target, Tensor? samples, *, float factor,"
    " bool relu) -> ()",
    // Sequential MSE: sums along the last dimension, float32 terms in float64.
    "reconstruction_error(Tensor output, Tensor? target=None, str loss='mse') -> Tensor",
    "row_dot(Tensor a, Tensor b) -> Tensor",
    // The version of the library that registered the ops.
    "_version() -> str",
};

// Libraries deregister when they are destroyed; these live as long as the process.
torch::Library& library(torch::Library::Kind kind, std::optional<c10::DispatchKey> key) {
  return *new torch::Library(kind, "rimet", key, __FILE__, __LINE__);
}

void register_all() {
  auto& definitions = library(torch::Library::DEF, std::nullopt);
  for (const char* schema : kSchemas) {
    definitions.def(schema, {at::Tag::pt2_compliant_tag});
  }
  definitions.impl("_version", torch::CppFunction::makeFromUnboxedFunction(
                                   +[]() { return std::string(RIMET_VERSION); }));

  auto& cpu = library(torch::Library::IMPL, c10::DispatchKey::CPU);
  register_affine_cpu(cpu);
  register_float_cpu(cpu);
  register_grouped_block_cpu(cpu);
  register_min_max_cpu(cpu);
  register_adaround_cpu(cpu);
  register_seq_mse_cpu(cpu);

  // Where no CUDA kernel can be had, these go on with tensor ops themselves.
  auto& cuda = library(torch::Library::IMPL, c10::DispatchKey::CUDA);
  register_affine_cuda(cuda);
  register_float_cuda(cuda);
  register_min_max_cuda(cuda);
  register_adaround_cuda(cuda);
  register_seq_mse_cuda(cuda);

  // Devices without kernels of their own take plain tensor ops.
  auto& composite = library(torch::Library::IMPL, c10::DispatchKey::CompositeExplicitAutograd);
  register_affine_composite(composite);
  register_float_composite(composite);
  register_grouped_block_composite(composite);
  register_min_max_composite(composite);
  register_adaround_composite(composite);
  register_seq_mse_composite(composite);

  auto& meta = library(torch::Library::IMPL, c10::DispatchKey::Meta);
  register_affine_meta(meta);
  register_float_meta(meta);
  register_grouped_block_meta(meta);
  register_min_max_meta(meta);
  register_adaround_meta(meta);
  register_seq_mse_meta(meta);

  auto& autograd = library(torch::Library::IMPL, c10::DispatchKey::Autograd);
  register_affine_autograd(autograd);
  register_float_autograd(autograd);
  register_grouped_block_autograd(autograd);
  register_adaround_autograd(autograd);
  // These have no derivative: asking for one is an error, not a silent zero.
  for (const char* name :
       {"min_max", "quantize_backward", "dequantize_backward", "quantize_dequantize_backward",
        "quantize_dequantize_range_backward", "range_to_scale_offset_backward",
        "float_quantize_backward", "float_quantize_dequantize_backward",
        "grouped_block_scale_backward", "adaround_quantize_dequantize_backward",
        "adaround_regularizer_backward", "adaround_step_", "reconstruction_gradient_",
        "reconstruction_error", "row_dot"}) {
    autograd.impl(name, torch::autograd::autogradNotImplementedFallback());
  }

  // Autocast leaves the ops alone: the result has the dtype of the input, whatever that is, and
  // encodings are raised to float32 inside the kernels.
  for (auto key : {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA}) {
    auto& autocast = library(torch::Library::IMPL, key);
    for (const char* name :
         {"quantize", "dequantize", "quantize_dequantize", "quantize_dequantize_range",
          "quantize_dequantize_range_", "float_quantize", "float_quantize_dequantize"}) {
      autocast.impl(name, torch::CppFunction::makeFallthrough());
    }
  }
}

}  // namespace
}  // namespace rimet

// Registers the ops unless another copy of this library has. Answers the version of the copy whose
// ops are in use.
extern "C" const char* rimet_register_ops() {
  static std::once_flag once;
  static std::string version;
  std::call_once(once, [] {
    auto& dispatcher = c10::Dispatcher::singleton();
    if (!dispatcher.findSchema({"rimet::_version", ""}).has_value()) {
      rimet::register_all();
    }
    version = dispatcher.findSchemaOrThrow("rimet::_version", "").typed<std::string()>().call();
  });
  return version.c_str();
}
