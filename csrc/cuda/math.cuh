// Exponential, logarithm and the like: twin of src/kernels/cpu/math.rs, which explains them.
// float32 results are the CPU's to the bit; float64 is the device's own library.
#pragma once

#include "device.cuh"

namespace rimet {

__device__ __forceinline__ float floor_of(float x) { return floorf(x); }
__device__ __forceinline__ double floor_of(double x) { return floor(x); }
__device__ __forceinline__ float root_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double root_of(double x) { return sqrt(x); }

constexpr u32 kMantissaBits = 23;
constexpr u32 kExponentBias = 127u << kMantissaBits;

__device__ __forceinline__ float exp_of(float x) {
  x = limit(x, -87.0f, 87.0f);
  const float n = round_even(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.1219444e-4f;
  float p = 1.9875691e-4f * r + 1.3982e-3f;
  p = p * r + 8.333452e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  const float value = (p * (r * r) + r) + 1.0f;
  const u32 power = (bits_of(n + 12582912.0f) << kMantissaBits) + kExponentBias;
  return value * of_bits<float>(power);
}
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Of a positive, normal x.
__device__ __forceinline__ float ln_of(float x) {
  constexpr u32 kSqrtHalf = 0x3f3504f3u;
  constexpr u32 kMantissa = (1u << kMantissaBits) - 1;
  const u32 shifted = bits_of(x) + (kExponentBias - kSqrtHalf);
  const float e =
      of_bits<float>((shifted >> kMantissaBits) | bits_of(8388608.0f)) - (8388608.0f + 127.0f);
  const float m = of_bits<float>((shifted & kMantissa) + kSqrtHalf);
  const float z = m - 1.0f;
  float p = 7.0376836e-2f * z - 1.151461e-1f;
  p = p * z + 1.1676999e-1f;
  p = p * z + -1.2420141e-1f;
  p = p * z + 1.4249323e-1f;
  p = p * z + -1.6668058e-1f;
  p = p * z + 2.0000715e-1f;
  p = p * z + -2.4999994e-1f;
  p = p * z + 0.33333334f;
  const float z2 = z * z;
  const float tail = ((p * z) * z2 + e * -2.1219444e-4f) - 0.5f * z2;
  return (z + tail) + e * 0.693359375f;
}
__device__ __forceinline__ double ln_of(double x) { return log(x); }

}  // namespace rimet
