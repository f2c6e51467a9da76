// grouped_block_scale: block scales as integer multiples of one scale per group of blocks (LPBQ).

#include "autograd.h"

namespace rimet {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

// The number of groups along each dimension.
std::vector<int64_t> group_shape(at::IntArrayRef scale, at::IntArrayRef grouping, int64_t levels) {
  TORCH_CHECK_VALUE(grouping.size() == scale.size(),
                    "rimet::grouped_block_scale: block_grouping: expected one entry for each of "
                    "the ",
                    scale.size(), " dimensions of scale, got ", grouping);
  TORCH_CHECK_VALUE(levels >= 1, "rimet::grouped_block_scale: levels: expected at least 1, got ",
                    levels);
  std::vector<int64_t> shape;
  for (size_t i = 0; i < grouping.size(); ++i) {
    const bool fits = grouping[i] == -1 || (grouping[i] >= 1 && scale[i] % grouping[i] == 0);
    TORCH_CHECK_VALUE(fits, "rimet::grouped_block_scale: block_grouping: expected -1 or a divisor ",
                      "of scale.shape[", i, "] = ", scale[i], ", got ", grouping);
    shape.push_back(grouping[i] == -1 ? 1 : scale[i] / grouping[i]);
  }
  return shape;
}

at::ScalarType compute_type(const Tensor& scale) {
  TORCH_CHECK_TYPE(at::isFloatingType(scale.scalar_type()),
                   "rimet::grouped_block_scale: scale: expected a floating-point tensor, got ",
                   scale.scalar_type());
  return scale.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- CPU ----------------------------------------------------------------------------------------

Pair forward_cpu(const Tensor& scale, at::IntArrayRef grouping, int64_t levels) {
  const auto shape = group_shape(scale.sizes(), grouping, levels);
  const Tensor s = scale.to(compute_type(scale)).contiguous();
  Tensor result = at::empty_like(s);
  Tensor group_scale = at::empty(shape, s.options());
  const auto view = view_of(s);
  check_status(rimet_grouped_block_scale(&view, shape.data(), levels, result.data_ptr(),
                                         group_scale.data_ptr()),
               "grouped_block_scale");
  return {result, group_scale};
}

Tensor backward_cpu(const Tensor& grad, const Tensor& grad_group, const Tensor& scale,
                    at::IntArrayRef grouping, int64_t levels) {
  const auto shape = group_shape(scale.sizes(), grouping, levels);
  const Tensor s = scale.to(compute_type(scale)).contiguous();
  const Tensor g = grad.to(s.scalar_type()).contiguous();
  const Tensor gg = grad_group.to(s.scalar_type()).contiguous();
  Tensor result = at::empty_like(s);
  const auto view = view_of(s);
  check_status(rimet_grouped_block_scale_backward(&view, shape.data(), levels, g.const_data_ptr(),
                                                  gg.const_data_ptr(), result.data_ptr()),
               "grouped_block_scale");
  return result.to(scale.scalar_type());
}

// ---- plain tensor ops: the same operations as src/kernels/cpu/grouped_block.rs
// -------------------

struct Groups {
  Blocks blocks;
  std::vector<int64_t> shape, inside;  // of the groups; the axes of a group's blocks
  Tensor scale, largest, group_scale, quotient, rounded;

  Groups(const Tensor& given, at::IntArrayRef grouping, int64_t levels)
      : blocks("grouped_block_scale", given.sizes(), group_shape(given.sizes(), grouping, levels),
               std::vector<int64_t>(grouping.size(), -1)),
        shape(group_shape(given.sizes(), grouping, levels)) {
    for (int64_t i = 0; i < given.dim(); ++i) {
      inside.push_back(2 * i + 1);
    }
    scale = given.to(compute_type(given)).reshape(blocks.shape);
    // Without dimensions there is one block, its own group.
    largest = inside.empty() ? scale : scale.amax(inside, /*keepdim=*/true);
    group_scale = largest / static_cast<double>(levels);
    quotient = scale / group_scale;
    rounded = at::round(quotient);
  }
};

Pair forward_tensor_ops(const Tensor& scale, at::IntArrayRef grouping, int64_t levels) {
  const Groups g(scale, grouping, levels);
  const Tensor result = g.rounded.clamp(1, levels) * g.group_scale;
  return {result.reshape(scale.sizes()), g.group_scale.reshape(g.shape)};
}

Tensor backward_tensor_ops(const Tensor& grad, const Tensor& grad_group, const Tensor& scale,
                           at::IntArrayRef grouping, int64_t levels) {
  const Groups g(scale, grouping, levels);
  const Tensor up = grad.to(g.scale.scalar_type()).reshape(g.blocks.shape);
  const Tensor on_grid = (g.rounded >= 1).logical_and(g.rounded <= levels);
  const Tensor slope = at::where(on_grid, g.rounded - g.quotient, g.rounded.clamp(1, levels));
  const Tensor to_group = (up * slope).sum_to_size(g.blocks.encoding) +
                          grad_group.to(up.scalar_type()).reshape(g.blocks.encoding);
  const Tensor is_largest = (g.scale == g.largest).to(up.scalar_type());
  const Tensor ties = is_largest.sum_to_size(g.blocks.encoding);
  const Tensor result = at::where(on_grid, up, at::zeros({}, up.options())) +
                        is_largest * (to_group / static_cast<double>(levels) / ties);
  return result.reshape(scale.sizes()).to(scale.scalar_type());
}

// ---- Meta ---------------------------------------------------------------------------------------

Pair forward_meta(const Tensor& scale, at::IntArrayRef grouping, int64_t levels) {
  const auto options = scale.options().dtype(compute_type(scale));
  return {at::empty(scale.sizes(), options),
          at::empty(group_shape(scale.sizes(), grouping, levels), options)};
}

Tensor backward_meta(const Tensor&, const Tensor&, const Tensor& scale, at::IntArrayRef, int64_t) {
  return at::empty(scale.sizes(), scale.options());
}

// ---- Autograd -----------------------------------------------------------------------------------

struct GroupedBlockScale : torch::autograd::Function<GroupedBlockScale> {
  static auto& op() {
    return RIMET_HANDLE("grouped_block_scale", Pair(const Tensor&, at::IntArrayRef, int64_t));
  }

  static variable_list forward(AutogradContext* context, const Tensor& scale,
                               const std::vector<int64_t>& grouping, int64_t levels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({scale});
    context->saved_data["block_grouping"] = grouping;
    context->saved_data["levels"] = levels;
    auto [result, group_scale] = op().call(scale, grouping, levels);
    return {result, group_scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& handle =
        RIMET_HANDLE("grouped_block_scale_backward",
                     Tensor(const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef, int64_t));
    const Tensor scale = context->get_saved_variables()[0];
    const auto grouping = context->saved_data["block_grouping"].toIntVector();
    const int64_t levels = context->saved_data["levels"].toInt();
    // The results that nothing was made of have no gradient.
    const auto grad = [&](size_t i, at::IntArrayRef shape) {
      return grads[i].defined() ? grads[i] : at::zeros(shape, scale.options());
    };
    const Tensor result =
        handle.call(grad(0, scale.sizes()), grad(1, group_shape(scale.sizes(), grouping, levels)),
                    scale, grouping, levels);
    return {result, Tensor(), Tensor()};
  }
};

Pair autograd(const Tensor& scale, at::IntArrayRef grouping, int64_t levels) {
  if (!wants_grad(scale)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return GroupedBlockScale::op().call(scale, grouping, levels);
  }
  auto result = GroupedBlockScale::apply(scale, grouping.vec(), levels);
  return {result[0], result[1]};
}

}  // namespace

void register_grouped_block_cpu(torch::Library& m) {
  m.impl("grouped_block_scale", forward_cpu);
  m.impl("grouped_block_scale_backward", backward_cpu);
}
void register_grouped_block_composite(torch::Library& m) {
  m.impl("grouped_block_scale", forward_tensor_ops);
  m.impl("grouped_block_scale_backward", backward_tensor_ops);
}
void register_grouped_block_meta(torch::Library& m) {
  m.impl("grouped_block_scale", forward_meta);
  m.impl("grouped_block_scale_backward", backward_meta);
}
void register_grouped_block_autograd(torch::Library& m) { m.impl("grouped_block_scale", autograd); }

}  // namespace rimet
