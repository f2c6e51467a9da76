// What the ops' autograd functions share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"

namespace rimet {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class... T>
bool wants_grad(const T&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

inline std::optional<std::vector<int64_t>> saved_block(AutogradContext& context, const char* key) {
  return context.saved_data[key].toOptional<std::vector<int64_t>>();
}

inline Block as_ref(const std::optional<std::vector<int64_t>>& block) {
  return block ? Block(at::IntArrayRef(*block)) : Block(std::nullopt);
}

}  // namespace rimet

// An op's handle, looked up once.
#define RIMET_HANDLE(op, ...)                                                                  \
  ([]() -> auto& {                                                                             \
    static auto handle =                                                                       \
        c10::Dispatcher::singleton().findSchemaOrThrow("rimet::" op, "").typed<__VA_ARGS__>(); \
    return handle;                                                                             \
  }())
