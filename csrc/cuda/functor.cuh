// What the functors of elementwise.cuh and reduce.cuh are made of: an operation on one element, the
// tensors that it reads and writes, and the sums over them.
//
// An operation O is a template of the type C that is computed in. It gives: Args, a struct with a
// member `tensors`; kInputs and kOutputs; apply(v, encoding, args), where v holds the element of
// each input and is left holding that of each output. Args gives Encoding, sole_encoding() for
// tensors that have one, and encoding(group). Where something is summed, apply answers Terms, and
// Args gives kSums and finish(group, sums), which writes the result.
#pragma once

#include "elementwise.cuh"
#include "reduce.cuh"

namespace rimet {

// The memory of a functor's tensors: inputs first, then outputs. A null input is all zeros; a null
// output is not wanted.
template <u32 N>
struct Tensors {
  void* data[N];
  u64 vectorized;  // whole 16-byte accesses are aligned
};

// The encoding of operations that need none.
struct NoEncoding {};

// What an element adds to each sum.
template <class C, u32 N>
struct Terms {
  C terms[N];
};

// A functor's arguments.
template <class A>
class Holder {
 public:
  using Args = A;
  __device__ __forceinline__ explicit Holder(const Args& args) : args_(args) {}

 protected:
  const Args& args_;
};

// A reduction to A::kSums sums, in float64.
template <class A>
class Sums : public Holder<A> {
 public:
  struct Partial {
    double sums[A::kSums];
  };

  using Holder<A>::Holder;

  static __device__ __forceinline__ Partial identity() { return {}; }
  static __device__ __forceinline__ void combine(Partial& into, const Partial& from) {
#pragma unroll
    for (u32 i = 0; i < A::kSums; ++i) {
      into.sums[i] += from.sums[i];
    }
  }
  __device__ __forceinline__ void finish(u64 group, const Partial& partial) const {
    this->args_.finish(group, partial.sums);
  }
};

// Reading and writing for a functor that derives from Base. T: what the tensors hold.
template <class Base, class T, class C, u32 kInputs, u32 kOutputs>
class Access : public Base {
 public:
  using Encoding = typename Base::Args::Encoding;
  static constexpr u32 kWidth = rimet::kWidth<T>;
  static constexpr u32 kValues = kInputs > kOutputs ? kInputs : kOutputs;
  struct Values {
    C x[kValues][kWidth];

    __device__ __forceinline__ void get(C (&v)[kValues], u32 j) const {
#pragma unroll
      for (u32 i = 0; i < kValues; ++i) {
        v[i] = x[i][j];
      }
    }
    __device__ __forceinline__ void set(const C (&v)[kValues], u32 j) {
#pragma unroll
      for (u32 i = 0; i < kOutputs; ++i) {
        x[i][j] = v[i];
      }
    }
  };

  using Base::Base;

  __device__ __forceinline__ Encoding sole_encoding() const { return this->args_.sole_encoding(); }
  __device__ __forceinline__ Encoding encoding(u64 group) const {
    return this->args_.encoding(group);
  }
  __device__ __forceinline__ void load(Values& values, u64 start, u32 n) const {
    const auto& tensors = this->args_.tensors;
#pragma unroll
    for (u32 i = 0; i < kInputs; ++i) {
      const T* input = static_cast<const T*>(tensors.data[i]);
      if (input) {
        rimet::load(values.x[i], input + start, n, tensors.vectorized);
      } else {
#pragma unroll
        for (u32 j = 0; j < kWidth; ++j) {
          values.x[i][j] = C(0);
        }
      }
    }
  }
  __device__ __forceinline__ void store(const Values& values, u64 start, u32 n) const {
    const auto& tensors = this->args_.tensors;
#pragma unroll
    for (u32 i = 0; i < kOutputs; ++i) {
      T* output = static_cast<T*>(tensors.data[kInputs + i]);
      if (output) {
        rimet::store(values.x[i], output + start, n, tensors.vectorized);
      }
    }
  }
};

// The operation O on each element.
template <template <class> class O, class T, class C>
class Map : public Access<Holder<typename O<C>::Args>, T, C, O<C>::kInputs, O<C>::kOutputs> {
 public:
  using Base = Access<Holder<typename O<C>::Args>, T, C, O<C>::kInputs, O<C>::kOutputs>;
  using typename Base::Encoding;
  using typename Base::Values;

  using Base::Base;

  __device__ __forceinline__ void apply(Values& values, u32 j, const Encoding& encoding) const {
    C v[Base::kValues];
    values.get(v, j);
    O<C>::apply(v, encoding, this->args_);
    values.set(v, j);
  }
};

// The operation O on each element, and the sums of its terms: in C over at most 256 elements, in
// float64 beyond.
template <template <class> class O, class T, class C>
class MapReduce : public Access<Sums<typename O<C>::Args>, T, C, O<C>::kInputs, O<C>::kOutputs> {
 public:
  using Base = Access<Sums<typename O<C>::Args>, T, C, O<C>::kInputs, O<C>::kOutputs>;
  using typename Base::Encoding;
  using typename Base::Partial;
  using typename Base::Values;
  static constexpr u32 kSums = Base::Args::kSums;
  struct Accumulator {
    C sums[kSums] = {};
  };

  using Base::Base;

  __device__ __forceinline__ void take(Accumulator& accumulator, Values& values, u32 j,
                                       const Encoding& encoding) const {
    C v[Base::kValues];
    values.get(v, j);
    const Terms<C, kSums> terms = O<C>::apply(v, encoding, this->args_);
    values.set(v, j);
#pragma unroll
    for (u32 i = 0; i < kSums; ++i) {
      accumulator.sums[i] += terms.terms[i];
    }
  }
  static __device__ __forceinline__ Partial total(const Accumulator& accumulator) {
    Partial partial;
#pragma unroll
    for (u32 i = 0; i < kSums; ++i) {
      partial.sums[i] = static_cast<double>(accumulator.sums[i]);
    }
    return partial;
  }
};

}  // namespace rimet
