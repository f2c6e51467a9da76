// csrc/cuda for a C++ compiler: the kernels of rimet on the CPU, for tests on machines without a
// GPU. Never part of what is shipped.
//
// Arithmetic, indexing, barriers and argument structs are those of the GPU's program. What this
// cannot show: the speed, the device's own rounding (NVRTC is told not to fuse or approximate),
// memory coherence between threads that do not meet at a barrier.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

// After the standard headers, which use some of these words themselves.
#define __device__
#define __forceinline__ inline
#define __noinline__
// Blocks run one after the other, so the block's memory may be the process's.
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct HostIndex {
  unsigned x;
};
extern HostIndex threadIdx;
extern HostIndex blockIdx;

// Returns when all threads of the block have come to it (driver.cpp).
void __syncthreads();

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}

namespace rimet {

using std::memcpy;

inline float f16_to_f32(unsigned short bits) {
  _Float16 value;
  memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}
inline unsigned short f32_to_f16(float value) {
  const auto half = static_cast<_Float16>(value);
  unsigned short bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}

}  // namespace rimet

// An entry point: what one thread does, given the argument.
#define RIMET_KERNEL(name, bytes, ...)                                                      \
  static_assert(sizeof(decltype(rimet::argument_of(&__VA_ARGS__))) == bytes, #name);        \
  extern "C" void name(const void* argument) {                                              \
    __VA_ARGS__(*static_cast<const decltype(rimet::argument_of(&__VA_ARGS__))*>(argument)); \
  }
