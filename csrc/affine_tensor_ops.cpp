// The affine ops as plain tensor ops, for devices without kernels of their own. Same formulas, same
// order of operations as src/kernels/cpu/affine.rs.

#include "ops.h"

namespace rimet {

Blocks::Blocks(const char* op, at::IntArrayRef input, at::IntArrayRef groups,
               const std::optional<std::vector<int64_t>>& block) {
  TORCH_CHECK_VALUE(groups.size() <= input.size() || c10::multiply_integers(groups) == 1,
                    "rimet::", op, ": scale: expected a shape that broadcasts to the input's ",
                    input, ", got ", groups);
  const size_t skip = groups.size() > input.size() ? groups.size() - input.size() : 0;
  const size_t lead = input.size() - (groups.size() - skip);
  for (size_t i = 0; i < input.size(); ++i) {
    const size_t k = i - lead + skip;
    const int64_t g = i < lead ? 1 : groups[k];
    const int64_t wanted = i < lead || !block ? -1 : (*block)[k];
    const bool fits = g > 0 && input[i] % g == 0 &&
                      (!block || wanted == -1 || wanted * g == input[i]) &&
                      (block || g == 1 || g == input[i]);
    TORCH_CHECK_VALUE(fits, "rimet::", op, ": scale, block_size: expected to divide the input's ",
                      input, " at dimension ", i, ", got scale ", groups);
    shape.insert(shape.end(), {g, input[i] / g});
    encoding.insert(encoding.end(), {g, 1});
  }
}

namespace {

// Constants of a range on a grid.
struct Range {
  const AffineArgs& args;
  double steps;
  double smallest_scale;

  explicit Range(const AffineArgs& a)
      : args(a),
        steps(static_cast<double>(a.qmax - a.qmin)),
        smallest_scale(std::min<double>(std::numeric_limits<float>::epsilon(), 0.01 / steps)) {}

  // (max - min) / steps; the divisor is a tensor, since a number would become a factor.
  Tensor signed_scale(const Tensor& min, const Tensor& max) const {
    return (max - min) / at::full({}, steps, min.options());
  }

  Pair scale_offset(const Tensor& min, const Tensor& max) const {
    const Tensor scale = signed_scale(min, max).abs().clamp_min(smallest_scale);
    const Tensor offset = args.symmetric
                              ? at::full_like(scale, -std::nearbyint((args.qmin + args.qmax) / 2.0))
                              : (at::round(min / scale) - args.qmin).clamp(-args.qmax, -args.qmin);
    return {scale, offset};
  }

  // Gradients of min and max from those of scale and offset.
  Pair gradients(const Tensor& min, const Tensor& max, Tensor grad_scale,
                 const Tensor& grad_offset) const {
    const Tensor zero = at::zeros({}, min.options());
    const Tensor signed_s = signed_scale(min, max);
    Tensor direct = at::zeros_like(grad_scale);
    if (!args.symmetric) {
      const Tensor scale = signed_s.abs().clamp_min(smallest_scale);
      const Tensor offset = at::round(min / scale) - args.qmin;
      const Tensor free = (offset >= -args.qmax).logical_and(offset <= -args.qmin);
      const Tensor kept = at::where(free, grad_offset, zero);
      direct = kept / scale;
      grad_scale = grad_scale - kept * min / (scale * scale);
    }
    const Tensor slope =
        at::where(signed_s.abs() < smallest_scale, zero, at::sign(signed_s) / steps);
    const Tensor towards_max = grad_scale * slope;
    return {direct - towards_max, towards_max};
  }
};

struct Prepared {
  Blocks blocks;
  Tensor x, first, second, scale, offset;

  Prepared(const AffineArgs& args, const Tensor& input, const Tensor& a, const Tensor& b)
      : blocks(args.name, input.sizes(), a.sizes(), args.block) {
    const auto type = args.compute_type(input.scalar_type());
    x = input.to(type).reshape(blocks.shape);
    first = a.to(type).reshape(blocks.encoding);
    second = b.to(type).reshape(blocks.encoding);
    scale = first;
    offset = second;
    if (args.is_range) {
      std::tie(scale, offset) = Range(args).scale_offset(first, second);
    }
  }
};

}  // namespace

Tensor affine_forward_tensor_ops(const AffineArgs& args, const Tensor& input, const Tensor& first,
                                 const Tensor& second) {
  const Prepared p(args, input, first, second);
  const double shift = args.zero_point_shift;
  Tensor y;
  switch (args.op) {
    case AffineArgs::kQuantize:
      y = (at::round(p.x / p.scale) - p.offset).clamp(args.qmin, args.qmax);
      break;
    case AffineArgs::kDequantize:
      y = (p.x + p.offset) * p.scale;
      break;
    case AffineArgs::kQuantizeDequantize:
      y = (at::round(p.x / p.scale - shift) - p.offset).clamp(args.qmin, args.qmax);
      y = (y + (p.offset + shift)) * p.scale;
      break;
  }
  return at::empty_like(input).copy_(y.reshape(input.sizes()));
}

Grads affine_backward_tensor_ops(const AffineArgs& args, const Tensor& grad, const Tensor& input,
                                 const Tensor& first, const Tensor& second, Mask mask) {
  const Prepared p(args, input, first, second);
  const double shift = args.zero_point_shift;
  const Tensor g = grad.to(p.x.scalar_type()).reshape(p.blocks.shape);
  const Tensor zero = at::zeros({}, g.options());
  Tensor gx, gs, go;
  if (args.op == AffineArgs::kDequantize) {
    gx = g * p.scale;
    gs = g * (p.x + p.offset);
    go = gx;
  } else {
    const Tensor t = p.x / p.scale - shift;
    const Tensor rounded = at::round(t);
    const Tensor q = rounded - p.offset;
    const Tensor inside = (q >= args.qmin).logical_and(q <= args.qmax);
    if (args.op == AffineArgs::kQuantize) {
      const Tensor kept = at::where(inside, g, zero);
      gx = kept / p.scale;
      gs = at::where(inside, -(gx * t), zero);
      go = -kept;
    } else {
      gx = at::where(inside, g, zero);
      gs = g * at::where(inside, rounded - t,
                         at::clamp(rounded, p.offset + args.qmin, p.offset + args.qmax));
      go = at::where(inside, zero, g * p.scale);
    }
  }
  Tensor grad_first = gs.sum_to_size(p.blocks.encoding);
  Tensor grad_second = go.sum_to_size(p.blocks.encoding);
  if (args.is_range) {
    std::tie(grad_first, grad_second) =
        Range(args).gradients(p.first, p.second, grad_first, grad_second);
  }
  return {mask[0] ? at::empty_like(input).copy_(gx.reshape(input.sizes())) : Tensor(),
          mask[1] ? grad_first.reshape(first.sizes()).to(first.scalar_type()) : Tensor(),
          mask[2] ? grad_second.reshape(second.sizes()).to(second.scalar_type()) : Tensor()};
}

Pair range_to_scale_offset_tensor_ops(const AffineArgs& args, const Tensor& min,
                                      const Tensor& max) {
  const auto type = args.compute_type(min.scalar_type());
  return Range(args).scale_offset(min.to(type), max.to(type));
}

Pair range_to_scale_offset_backward_tensor_ops(const AffineArgs& args, const Tensor& grad_scale,
                                               const Tensor& grad_offset, const Tensor& min,
                                               const Tensor& max) {
  const auto type = args.compute_type(min.scalar_type());
  auto [low, high] =
      Range(args).gradients(min.to(type), max.to(type), grad_scale.to(type), grad_offset.to(type));
  return {low.to(min.scalar_type()), high.to(max.scalar_type())};
}

}  // namespace rimet
