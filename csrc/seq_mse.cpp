// The memory-bound part of Sequential MSE: errors of many candidates at once, one read.

#include "ops.h"

namespace rimet {
namespace {

enum Kind : int32_t { kSquared = 0, kAbsolute = 1, kProduct = 2 };

Kind kind_of(c10::string_view loss) {
  TORCH_CHECK_VALUE(loss == "mse" || loss == "l1",
                    "rimet::reconstruction_error: loss: expected mse or l1, got ", loss);
  return loss == "mse" ? kSquared : kAbsolute;
}

void check_pair(const char* op, const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() >= 1, "rimet::", op, ": expected at least one dimension, got a scalar");
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), "rimet::", op, ": expected two tensors of shape ",
                    a.sizes(), ", got ", b.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), "rimet::", op,
                   ": expected two tensors of dtype ", a.scalar_type(), ", got ", b.scalar_type());
}

at::IntArrayRef rows_of(const Tensor& a) { return a.sizes().slice(0, a.dim() - 1); }

// kernel: a device's, as a function of the engine's arguments.
template <class Kernel>
Tensor run_row_sums(const char* op, Kind kind, const Tensor& a, const Tensor* b, Kernel&& kernel) {
  check_pair(op, a, b != nullptr ? *b : a);
  const Tensor x = a.contiguous();
  const Tensor y = b != nullptr ? b->contiguous() : Tensor();
  Tensor sums = at::empty(rows_of(a), a.options().dtype(at::kDouble));
  kernel(kind, x.const_data_ptr(), b != nullptr ? y.const_data_ptr() : nullptr,
         static_cast<int32_t>(x.scalar_type()), sums.numel(), a.size(-1), sums.data_ptr<double>());
  return sums;
}

Tensor row_sums_cpu(const char* op, Kind kind, const Tensor& a, const Tensor* b) {
  return run_row_sums(op, kind, a, b,
                      [&](auto... arguments) { check_status(rimet_row_sums(arguments...), op); });
}

Tensor row_sums_composite(const char* op, Kind kind, const Tensor& a, const Tensor* b) {
  check_pair(op, a, b != nullptr ? *b : a);
  Tensor terms;
  if (kind == kProduct) {
    terms = a * *b;
  } else {
    const Tensor difference = b != nullptr ? a - *b : a;
    terms = kind == kSquared ? difference * difference : difference.abs();
  }
  return terms.sum(-1, /*keepdim=*/false, at::kDouble);
}

Tensor row_sums_cuda(const char* op, Kind kind, const Tensor& a, const Tensor* b) {
  CudaCall call(a);
  bool ran = false;
  const Tensor sums = run_row_sums(op, kind, a, b, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_row_sums(call.device(), arguments...), op);
  });
  return ran ? sums : row_sums_composite(op, kind, a, b);
}

template <auto RowSums>
Tensor reconstruction_error(const Tensor& output, const std::optional<Tensor>& target,
                            c10::string_view loss) {
  return RowSums("reconstruction_error", kind_of(loss), output,
                 target.has_value() ? &*target : nullptr);
}

template <auto RowSums>
Tensor row_dot(const Tensor& a, const Tensor& b) {
  return RowSums("row_dot", kProduct, a, &b);
}

Tensor row_sums_meta(const char* op, Kind, const Tensor& a, const Tensor* b) {
  TORCH_CHECK_VALUE(a.dim() >= 1, "rimet::", op, ": expected at least one dimension, got a scalar");
  return at::empty_symint(a.sym_sizes().slice(0, a.dim() - 1), a.options().dtype(at::kDouble));
}

template <auto RowSums>
void register_all(torch::Library& m) {
  m.impl("reconstruction_error", reconstruction_error<RowSums>);
  m.impl("row_dot", row_dot<RowSums>);
}

}  // namespace

void register_seq_mse_cpu(torch::Library& m) { register_all<row_sums_cpu>(m); }
void register_seq_mse_cuda(torch::Library& m) { register_all<row_sums_cuda>(m); }
void register_seq_mse_composite(torch::Library& m) { register_all<row_sums_composite>(m); }
void register_seq_mse_meta(torch::Library& m) { register_all<row_sums_meta>(m); }

}  // namespace rimet
