// What every kernel stands on: the types tensors hold, 16-byte accesses, arithmetic without
// surprises, and the macro that makes an entry point.
//
// Plain CUDA C++17 for NVRTC: no headers but those of this folder. The same text is compiled by a
// C++ compiler in the tests (tests/cuda/host.h), so whatever is CUDA's alone stands between the two
// #if.
#pragma once

#ifndef __CUDACC__
#include "host.h"
#endif

namespace rimet {

using u32 = unsigned int;
using u64 = unsigned long long;

// Threads of a block, for every kernel.
constexpr u32 kThreads = 256;

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#ifdef __CUDACC__
__device__ __forceinline__ float f16_to_f32(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ unsigned short f32_to_f16(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

// ---- arithmetic: twin of src/kernels/cpu/element.rs
// -----------------------------------------------

// To the nearest integer, ties to even.
__device__ __forceinline__ float round_even(float x) { return rintf(x); }
__device__ __forceinline__ double round_even(double x) { return rint(x); }

// x limited to low..=high; NaN stays NaN (compare and select, not min and max).
template <class C>
__device__ __forceinline__ C limit(C x, C low, C high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The bits of a type that kernels compute in.
template <class C>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Type = u32;
};
template <>
struct BitsOf<double> {
  using Type = u64;
};
template <class C>
using Bits = typename BitsOf<C>::Type;

template <class C>
__device__ __forceinline__ Bits<C> bits_of(C x) {
  Bits<C> bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <class C>
__device__ __forceinline__ C of_bits(Bits<C> bits) {
  C x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class C>
__device__ __forceinline__ Bits<C> sign_bit() {
  return Bits<C>(1) << (8 * sizeof(C) - 1);
}

template <class C>
__device__ __forceinline__ C magnitude_of(C x) {
  return of_bits<C>(bits_of(x) & ~sign_bit<C>());
}

// x, which is not negative, with the sign of y.
template <class C>
__device__ __forceinline__ C with_sign_of(C x, C y) {
  return of_bits<C>(bits_of(x) | (bits_of(y) & sign_bit<C>()));
}

template <class C>
__device__ __forceinline__ C infinity() {
  return static_cast<C>(of_bits<float>(0x7f800000u));
}

template <class C>
__device__ __forceinline__ bool is_nan(C x) {
  return x != x;
}

// What tensors hold, as the type kernels compute in, and back, rounded to nearest even. Half
// precision goes by way of float32 also where kernels compute in float64.
template <class C>
__device__ __forceinline__ C widen(float x) {
  return static_cast<C>(x);
}
template <class C>
__device__ __forceinline__ C widen(double x) {
  return static_cast<C>(x);
}
template <class C>
__device__ __forceinline__ C widen(f16 x) {
  return static_cast<C>(f16_to_f32(x.bits));
}
template <class C>
__device__ __forceinline__ C widen(bf16 x) {
  return static_cast<C>(of_bits<float>(static_cast<u32>(x.bits) << 16));
}

template <class C>
__device__ __forceinline__ void narrow(float& out, C x) {
  out = static_cast<float>(x);
}
template <class C>
__device__ __forceinline__ void narrow(double& out, C x) {
  out = static_cast<double>(x);
}
template <class C>
__device__ __forceinline__ void narrow(f16& out, C x) {
  out.bits = f32_to_f16(static_cast<float>(x));
}
template <class C>
__device__ __forceinline__ void narrow(bf16& out, C x) {
  const float value = static_cast<float>(x);
  const u32 bits = bits_of(value);
  // Rounding could carry a NaN into infinity; torch's NaN is 0x7fc0.
  out.bits = static_cast<unsigned short>(
      is_nan(value) ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- memory
// -----------------------------------------------------------------------------------------

// Elements of one 16-byte access; the number that a thread handles at a time.
template <class T>
constexpr u32 kWidth = 16 / sizeof(T);

// Reads the first n of kWidth elements from p; the others become zero. vectorized: p is aligned to
// 16 bytes wherever n is kWidth.
template <class C, class T>
__device__ __forceinline__ void load(C (&values)[kWidth<T>], const T* p, u32 n, bool vectorized) {
  T stored[kWidth<T>] = {};
  if (vectorized && n == kWidth<T>) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(stored, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (u32 j = 0; j < kWidth<T>; ++j) {
      if (j < n) {
        stored[j] = p[j];
      }
    }
  }
#pragma unroll
  for (u32 j = 0; j < kWidth<T>; ++j) {
    values[j] = widen<C>(stored[j]);
  }
}

// Writes the first n of kWidth values to p. vectorized: as for load.
template <class C, class T>
__device__ __forceinline__ void store(const C (&values)[kWidth<T>], T* p, u32 n, bool vectorized) {
  T stored[kWidth<T>];
#pragma unroll
  for (u32 j = 0; j < kWidth<T>; ++j) {
    narrow(stored[j], values[j]);
  }
  if (vectorized && n == kWidth<T>) {
    uint4 raw;
    memcpy(&raw, stored, sizeof(raw));
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
#pragma unroll
    for (u32 j = 0; j < kWidth<T>; ++j) {
      if (j < n) {
        p[j] = stored[j];
      }
    }
  }
}

template <class A>
__device__ A argument_of(void (*)(const A&));

}  // namespace rimet

// An entry point `name` that runs a function of this folder (a template with all its arguments)
// over its one argument, a struct of `bytes` bytes. src/kernels/cuda/kernel.rs writes these lines;
// the size is that of the struct's twin in Rust.
#ifdef __CUDACC__
#define RIMET_KERNEL(name, bytes, ...)                                                     \
  static_assert(sizeof(decltype(rimet::argument_of(&__VA_ARGS__))) == bytes, #name);       \
  extern "C" __global__ void __launch_bounds__(rimet::kThreads)                            \
      name(const __grid_constant__ decltype(rimet::argument_of(&__VA_ARGS__)) arguments) { \
    __VA_ARGS__(arguments);                                                                \
  }
#endif
