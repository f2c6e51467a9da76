// One read of a tensor, reduced to one value per encoding in a fixed order; an elementwise result
// may be written on the way.
//
// Two launches: reduce_runs or reduce_columns leave one partial result for each unit of work, and
// combine_partials adds up those of an encoding. Where each encoding has one unit the first is
// enough. The order of the sums follows from the tensor's layout alone, not from the GPU or from
// timing.
#pragma once

#include "geometry.cuh"

namespace rimet {

template <class R>
struct ReduceArgs {
  typename R::Args op;
  typename R::Partial* partials;
  ReducePlan plan;
};

// R gives: Args; kWidth; Values, Encoding, sole_encoding(), encoding(group), load and store as for
// elementwise; Accumulator (what a thread adds to, at most 256 times) with take(accumulator,
// values, j, encoding); Partial with identity(), total(accumulator), combine(into, from);
// finish(group, partial), which writes the result. combine_partials needs Args, Partial, identity,
// combine and finish alone.

// The innermost loop is reduced: teams of threads take stretches of it.
template <class R>
__device__ __forceinline__ void reduce_runs(const ReduceArgs<R>& args) {
  constexpr u32 N = R::kWidth;
  __shared__ typename R::Partial partials[kThreads];
  const R reduction(args.op);
  const ReducePlan& plan = args.plan;
  const u32 lane = threadIdx.x & (plan.team - 1);
  const u64 unit = static_cast<u64>(blockIdx.x) * (kThreads / plan.team) + threadIdx.x / plan.team;
  const bool active = unit < plan.units;
  u64 group = 0;
  auto partial = R::identity();
  if (active) {
    const u64 run = plan.parts.divide(unit);
    const u64 kept = plan.reduced.divide(run);
    u64 row;
    plan.find(kept, run - kept * plan.reduced.divisor, row, group);
    const u64 run_end = (row + 1) * plan.inner;
    const u64 begin = row * plan.inner + (unit - run * plan.parts.divisor) * plan.part_size;
    const u64 end = begin + plan.part_size < run_end ? begin + plan.part_size : run_end;
    const auto encoding =
        plan.num_groups == 1 ? reduction.sole_encoding() : reduction.encoding(group);
    typename R::Accumulator accumulator;
    for (u64 start = begin + lane * N; start < end; start += plan.team * N) {
      const u32 n = end - start < N ? static_cast<u32>(end - start) : N;
      typename R::Values values;
      reduction.load(values, start, n);
#pragma unroll
      for (u32 j = 0; j < N; ++j) {
        if (j < n) {
          reduction.take(accumulator, values, j, encoding);
        }
      }
      reduction.store(values, start, n);
    }
    partial = R::total(accumulator);
  }
  partials[threadIdx.x] = partial;
  __syncthreads();
  for (u32 half = plan.team / 2; half > 0; half /= 2) {
    if (lane < half) {
      R::combine(partials[threadIdx.x], partials[threadIdx.x + half]);
    }
    __syncthreads();
  }
  if (active && lane == 0) {
    if (plan.direct) {
      reduction.finish(group, partials[threadIdx.x]);
    } else {
      args.partials[unit] = partials[threadIdx.x];
    }
  }
}

// The innermost loop moves from encoding to encoding: each thread keeps to its columns and goes
// down the rows.
template <class R>
__device__ __forceinline__ void reduce_columns(const ReduceArgs<R>& args) {
  constexpr u32 N = R::kWidth;
  __shared__ typename R::Partial partials[N][kThreads];
  const R reduction(args.op);
  const ReducePlan& plan = args.plan;
  const u32 across = threadIdx.x & (plan.team - 1);
  const u32 down = threadIdx.x / plan.team;
  const u32 height = kThreads / plan.team;
  const u64 stack = plan.tiles.divide(blockIdx.x);
  const u64 kept = plan.parts.divide(stack);
  const u64 part = stack - kept * plan.parts.divisor;
  const u64 column = ((blockIdx.x - stack * plan.tiles.divisor) * plan.team + across) * N;
  const u64 left = column < plan.inner ? plan.inner - column : 0;
  const u32 n = left < N ? static_cast<u32>(left) : N;
  u64 row;
  u64 group;
  plan.find(kept, 0, row, group);
  group += column * plan.inner_stride;
  typename R::Accumulator accumulators[N];
  if (n > 0) {
    typename R::Encoding encodings[N];
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
      if (j < n) {
        encodings[j] = reduction.encoding(group + j * plan.inner_stride);
      }
    }
    const u64 from = part * plan.part_size;
    const u64 to =
        from + plan.part_size < plan.reduced.divisor ? from + plan.part_size : plan.reduced.divisor;
    for (u64 i = from + down; i < to; i += height) {
      u64 ignored;
      plan.find(kept, i, row, ignored);
      const u64 start = row * plan.inner + column;
      typename R::Values values;
      reduction.load(values, start, n);
#pragma unroll
      for (u32 j = 0; j < N; ++j) {
        if (j < n) {
          reduction.take(accumulators[j], values, j, encodings[j]);
        }
      }
      reduction.store(values, start, n);
    }
  }
#pragma unroll
  for (u32 j = 0; j < N; ++j) {
    partials[j][threadIdx.x] = R::total(accumulators[j]);
  }
  __syncthreads();
  for (u32 half = height / 2; half > 0; half /= 2) {
    if (down < half) {
#pragma unroll 1
      for (u32 j = 0; j < N; ++j) {
        R::combine(partials[j][threadIdx.x], partials[j][threadIdx.x + half * plan.team]);
      }
    }
    __syncthreads();
  }
  if (down == 0) {
#pragma unroll 1
    for (u32 j = 0; j < n; ++j) {
      if (plan.direct) {
        reduction.finish(group + j * plan.inner_stride, partials[j][threadIdx.x]);
      } else {
        args.partials[stack * plan.inner + column + j] = partials[j][threadIdx.x];
      }
    }
  }
}

// Adds up the partial results of each encoding and finishes it. They lie as [kept][count][columns],
// where columns is 1 after reduce_runs.
template <class R>
__device__ __forceinline__ void combine_partials(const ReduceArgs<R>& args) {
  __shared__ typename R::Partial partials[kThreads];
  const R reduction(args.op);
  const ReducePlan& plan = args.plan;
  const bool by_columns = plan.inner_stride != 0;
  const u64 columns = by_columns ? plan.inner : 1;
  const u64 count = by_columns ? plan.parts.divisor : plan.parts.divisor * plan.reduced.divisor;
  // Neighbouring threads read neighbouring partial results.
  const u32 width = kThreads / plan.combine_team;
  const u32 which = by_columns ? threadIdx.x % width : threadIdx.x / plan.combine_team;
  const u32 member = by_columns ? threadIdx.x / width : threadIdx.x % plan.combine_team;
  const u64 index = static_cast<u64>(blockIdx.x) * width + which;
  const bool active = index < plan.num_groups;
  const u64 kept = index / columns;
  const u64 column = index - kept * columns;
  auto partial = R::identity();
  if (active) {
    for (u64 k = member; k < count; k += plan.combine_team) {
      R::combine(partial, args.partials[(kept * count + k) * columns + column]);
    }
  }
  typename R::Partial* mine = partials + which * plan.combine_team;
  mine[member] = partial;
  __syncthreads();
  for (u32 half = plan.combine_team / 2; half > 0; half /= 2) {
    if (member < half) {
      R::combine(mine[member], mine[member + half]);
    }
    __syncthreads();
  }
  if (active && member == 0) {
    u64 row;
    u64 group;
    plan.find(kept, 0, row, group);
    reduction.finish(group + column * plan.inner_stride, mine[0]);
  }
}

}  // namespace rimet
