// The ops for programs written in Rust: through the dispatcher, so that autograd, CUDA and autocast
// work there as in Python. Twin of src/ops/ffi.rs.

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops.h"

using at::Tensor;
using rimet::Block;

namespace {

thread_local std::string last_error;
thread_local int last_kind = 0;

// Runs body; 0, or the kind of error (as in engine.h), whose message is kept.
template <class F>
int32_t guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const c10::ValueError& e) {
    last_error = e.what_without_backtrace();
    return 1;
  } catch (const c10::TypeError& e) {
    last_error = e.what_without_backtrace();
    return 2;
  } catch (const c10::Error& e) {
    last_error = e.what_without_backtrace();
    return 3;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 3;
  }
}

template <class Signature, class... Args>
auto call(const char* name, Args&&... args) {
  rimet_register_ops();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>().call(
      std::forward<Args>(args)...);
}

}  // namespace

extern "C" {

const char* rimet_op_error() { return last_error.c_str(); }

// op and the other arguments are RimetAffine's; first and second: scale and offset, or min and max.
int32_t rimet_op_affine(const RimetAffine* a, const Tensor* input, const Tensor* first,
                        const Tensor* second, Tensor** output) {
  return guarded([&] {
    const at::IntArrayRef sizes(a->block, a->block_len > 0 ? a->block_len : 0);
    const Block block = a->block_len >= 0 ? Block(sizes) : Block(std::nullopt);
    Tensor result;
    if (a->is_range) {
      using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, bool,
                               double, Block);
      result = call<Signature>("rimet::quantize_dequantize_range", *input, *first, *second, a->qmin,
                               a->qmax, a->symmetric != 0, a->zero_point_shift, block);
    } else if (a->op == rimet::AffineArgs::kQuantize) {
      using Signature =
          Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, Block);
      result = call<Signature>("rimet::quantize", *input, *first, *second, a->qmin, a->qmax, block);
    } else if (a->op == rimet::AffineArgs::kDequantize) {
      using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, Block);
      result = call<Signature>("rimet::dequantize", *input, *first, *second, block);
    } else {
      using Signature =
          Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double, Block);
      result = call<Signature>("rimet::quantize_dequantize", *input, *first, *second, a->qmin,
                               a->qmax, a->zero_point_shift, block);
    }
    *output = new Tensor(std::move(result));
  });
}

int32_t rimet_op_range_to_scale_offset(const Tensor* min, const Tensor* max, int64_t qmin,
                                       int64_t qmax, int32_t symmetric, Tensor** scale,
                                       Tensor** offset) {
  return guarded([&] {
    using Signature =
        std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, int64_t, bool);
    auto [s, o] =
        call<Signature>("rimet::range_to_scale_offset", *min, *max, qmin, qmax, symmetric != 0);
    *scale = new Tensor(std::move(s));
    *offset = new Tensor(std::move(o));
  });
}

int32_t rimet_op_min_max(const Tensor* input, const int64_t* shape, int64_t ndim,
                         const int64_t* block, int64_t block_len, Tensor** min, Tensor** max) {
  return guarded([&] {
    using Signature = std::tuple<Tensor, Tensor>(const Tensor&, at::IntArrayRef, Block);
    const at::IntArrayRef sizes(block, block_len > 0 ? block_len : 0);
    auto [low, high] = call<Signature>("rimet::min_max", *input, at::IntArrayRef(shape, ndim),
                                       block_len >= 0 ? Block(sizes) : Block(std::nullopt));
    *min = new Tensor(std::move(low));
    *max = new Tensor(std::move(high));
  });
}

// The grid and block size of the AdaRound ops are RimetAffine's.
int32_t rimet_op_adaround_quantize_dequantize(const RimetAffine* a, const Tensor* input,
                                              const Tensor* alpha, const Tensor* scale,
                                              const Tensor* offset, int32_t soft_rounding,
                                              Tensor** output) {
  return guarded([&] {
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                             int64_t, bool, Block);
    const at::IntArrayRef sizes(a->block, a->block_len > 0 ? a->block_len : 0);
    *output = new Tensor(call<Signature>("rimet::adaround_quantize_dequantize", *input, *alpha,
                                         *scale, *offset, a->qmin, a->qmax, soft_rounding != 0,
                                         a->block_len >= 0 ? Block(sizes) : Block(std::nullopt)));
  });
}

int32_t rimet_op_adaround_regularizer(const Tensor* alpha, double beta, Tensor** output) {
  return guarded([&] {
    *output = new Tensor(
        call<Tensor(const Tensor&, double)>("rimet::adaround_regularizer", *alpha, beta));
  });
}

// tensors: alpha, exp_avg, exp_avg_sq, output, grad, input, scale, offset.
int32_t rimet_op_adaround_step(const RimetAffine* a, Tensor* const* tensors, int64_t step,
                               double learning_rate, double reg_param, double beta) {
  return guarded([&] {
    using Signature =
        void(Tensor&, Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
             const Tensor&, int64_t, int64_t, Block, int64_t, double, double, double);
    const at::IntArrayRef sizes(a->block, a->block_len > 0 ? a->block_len : 0);
    call<Signature>("rimet::adaround_step_", *tensors[0], *tensors[1], *tensors[2], *tensors[3],
                    *tensors[4], *tensors[5], *tensors[6], *tensors[7], a->qmin, a->qmax,
                    a->block_len >= 0 ? Block(sizes) : Block(std::nullopt), step, learning_rate,
                    reg_param, beta);
  });
}

// samples may be null.
int32_t rimet_op_reconstruction_gradient(Tensor* output, const Tensor* target,
                                         const Tensor* samples, double factor, int32_t relu) {
  return guarded([&] {
    using Signature = void(Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool);
    call<Signature>("rimet::reconstruction_gradient_", *output, *target,
                    samples != nullptr ? std::optional<Tensor>(*samples) : std::nullopt, factor,
                    relu != 0);
  });
}

// The weight's gradient of a convolution alone; every list has dims entries.
int32_t rimet_op_convolution_weight_gradient(const Tensor* grad, const Tensor* input,
                                             const Tensor* weight, const int64_t* stride,
                                             const int64_t* padding, const int64_t* dilation,
                                             const int64_t* output_padding, int64_t dims,
                                             int32_t transposed, int64_t groups,
                                             Tensor** grad_weight) {
  return guarded([&] {
    const auto list = [&](const int64_t* values) { return at::IntArrayRef(values, dims); };
    auto result = at::convolution_backward(
        *grad, *input, *weight, at::OptionalIntArrayRef(std::nullopt), list(stride), list(padding),
        list(dilation), transposed != 0, list(output_padding), groups, {false, true, false});
    *grad_weight = new Tensor(std::get<1>(result));
  });
}

// target may be null.
int32_t rimet_op_reconstruction_error(const Tensor* output, const Tensor* target, const char* loss,
                                      Tensor** errors) {
  return guarded([&] {
    using Signature = Tensor(const Tensor&, const std::optional<Tensor>&, c10::string_view);
    *errors = new Tensor(
        call<Signature>("rimet::reconstruction_error", *output,
                        target != nullptr ? std::optional<Tensor>(*target) : std::nullopt, loss));
  });
}

int32_t rimet_op_row_dot(const Tensor* a, const Tensor* b, Tensor** dots) {
  return guarded([&] {
    *dots = new Tensor(call<Tensor(const Tensor&, const Tensor&)>("rimet::row_dot", *a, *b));
  });
}

}  // extern "C"
