// min_max: the range of each block, in one read.

#include "ops.h"

namespace rimet {
namespace {

// kernel: a device's, as a function of the engine's arguments.
template <class Kernel>
Pair run_min_max(const Tensor& input, at::IntArrayRef shape, Block block, Kernel&& kernel) {
  const Tensor x = dense(input);
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor min = at::empty(shape, x.options().dtype(type));
  Tensor max = at::empty_like(min);
  const auto view = view_of(x);
  kernel(&view, shape.data(), static_cast<int64_t>(shape.size()),
         block.has_value() ? block->data() : nullptr,
         block.has_value() ? static_cast<int64_t>(block->size()) : -1, min.data_ptr(),
         max.data_ptr());
  return {min.to(x.scalar_type()), max.to(x.scalar_type())};
}

Pair min_max_cpu(const Tensor& input, at::IntArrayRef shape, Block block) {
  return run_min_max(input, shape, block, [](auto... arguments) {
    check_status(rimet_min_max(arguments...), "min_max");
  });
}

Pair min_max_composite(const Tensor& input, at::IntArrayRef shape, Block block) {
  // Quantize's rule about shapes, through its meta function.
  AffineArgs args("min_max", AffineArgs::kDequantize);
  if (block.has_value()) {
    args.block = block->vec();
  }
  affine_forward_meta(args, input, at::empty(shape, input.options().device(at::kMeta)),
                      at::empty(shape, input.options().device(at::kMeta)));
  TORCH_CHECK_VALUE(input.numel() > 0,
                    "rimet::min_max: input: expected at least one element to take a minimum and "
                    "maximum of, got an empty tensor of shape ",
                    input.sizes());
  std::vector<int64_t> split;
  std::vector<int64_t> reduced;
  const int64_t lead = input.dim() - static_cast<int64_t>(shape.size());
  for (int64_t i = 0; i < input.dim(); ++i) {
    const int64_t groups = i < lead ? 1 : shape[i - lead];
    split.insert(split.end(), {groups, input.size(i) / groups});
    reduced.push_back(2 * i + 1);
  }
  const Tensor x = input.reshape(split);
  return {at::amin(x, reduced).reshape(shape), at::amax(x, reduced).reshape(shape)};
}

Pair min_max_cuda(const Tensor& input, at::IntArrayRef shape, Block block) {
  CudaCall call(input);
  bool ran = false;
  const Pair range = run_min_max(input, shape, block, [&](auto... arguments) {
    ran = call.ran(rimet_cuda_min_max(call.device(), arguments...), "min_max");
  });
  return ran ? range : min_max_composite(input, shape, block);
}

Pair min_max_meta(const Tensor& input, at::IntArrayRef shape, Block) {
  return {at::empty(shape, input.options()), at::empty(shape, input.options())};
}

}  // namespace

void register_min_max_cpu(torch::Library& m) { m.impl("min_max", min_max_cpu); }
void register_min_max_cuda(torch::Library& m) { m.impl("min_max", min_max_cuda); }
void register_min_max_composite(torch::Library& m) { m.impl("min_max", min_max_composite); }
void register_min_max_meta(torch::Library& m) { m.impl("min_max", min_max_meta); }

}  // namespace rimet
