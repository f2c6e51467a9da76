// A C++ program that uses the ops without Python: loads librimet.so, calls an op, runs a
// TorchScript file. Arguments: librimet.so model.pt
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/script.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 3 || dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << (argc == 3 ? dlerror() : "usage: consumer LIBRARY MODEL") << "\n";
    return 2;
  }
  auto dequantize = c10::Dispatcher::singleton()
                        .findSchemaOrThrow("rimet::dequantize", "")
                        .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                          at::OptionalIntArrayRef)>();
  const auto x = at::arange(4, at::kFloat);
  const auto y = dequantize.call(x, at::full({}, 0.5), at::full({}, -2.0), std::nullopt);
  auto model = torch::jit::load(argv[2]);
  const auto z = model.forward({x}).toTensor();
  std::cout << y[0].item<float>() << " " << y[3].item<float>() << " " << z[3].item<float>() << "\n";
}
