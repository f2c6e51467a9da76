// What the CUDA kernels (src/kernels/cuda) need of torch: the current stream, memory, and where
// NVRTC lies. No CUDA header or library: torch's device interface knows enough.

#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include "ops.h"

namespace rimet {

namespace {

void* allocate(void* owner, int64_t bytes) {
  return static_cast<CudaCall*>(owner)->allocate(bytes);
}

}  // namespace

CudaCall::CudaCall(const Tensor& tensor) : options_(tensor.options()), guard_(tensor.device()) {
  const auto device = tensor.device();
  device_.index = -1;
  device_.stream = nullptr;
  if (device.is_cuda()) {
    device_.index = device.index();
    device_.stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  }
  device_.allocate = rimet::allocate;
  device_.owner = this;
}

void* CudaCall::allocate(int64_t bytes) {
  // Called from Rust, which no exception may cross.
  try {
    scratch_.push_back(at::empty({bytes}, options_.dtype(at::kByte)));
    return scratch_.back().data_ptr();
  } catch (...) {
    error_ = std::current_exception();
    return nullptr;
  }
}

bool CudaCall::ran(int32_t status, const char* op) const {
  constexpr int32_t kUnavailable = 4;
  if (error_) {
    std::rethrow_exception(error_);
  }
  if (status == kUnavailable) {
    return false;
  }
  check_status(status, op);
  return true;
}

}  // namespace rimet

extern "C" const char* rimet_torch_library() {
  static const std::string path = [] {
    Dl_info info{};
    const auto* function = reinterpret_cast<const void*>(&at::get_num_threads);
    return std::string(dladdr(function, &info) != 0 && info.dli_fname ? info.dli_fname : "");
  }();
  return path.c_str();
}
