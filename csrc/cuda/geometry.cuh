// Which encoding belongs to which element: the loops of a BlockGeometry (src/encoding/block.rs),
// made ready for threads that each start somewhere in the middle. Twins of the structs in
// src/kernels/cuda/geometry.rs.
#pragma once

#include "device.cuh"

namespace rimet {

// A divisor, with the multiplication that replaces the division where both numbers are below 2^31
// (Granlund and Montgomery 1994).
struct Divider {
  u64 divisor;
  u32 magic;
  u32 shift;

  __device__ __forceinline__ u64 divide(u64 n) const {
    if (((n | divisor) >> 31) == 0) {
      const u32 small = static_cast<u32>(n);
      return (__umulhi(small, magic) + small) >> shift;
    }
    return n / divisor;
  }
};

// One loop around the innermost. A row is one iteration of all of them: a stretch of memory as long
// as the innermost loop.
struct Loop {
  Divider size;
  u64 row_stride;    // rows from one iteration to the next
  u64 group_stride;  // encodings from one iteration to the next
};

constexpr u32 kMaxLoops = 32;

// Splits an index over loops (innermost first); adds up where that is in rows and in encodings. Not
// inlined: kernels need it once or twice in many places.
__device__ __noinline__ void locate(const Loop* loops, u32 count, u64 index, u64& row, u64& group) {
  for (u32 k = 0; k < count; ++k) {
    u64 here = index;
    if (k + 1 < count) {
      index = loops[k].size.divide(index);
      here -= index * loops[k].size.divisor;
    }
    row += here * loops[k].row_stride;
    group += here * loops[k].group_stride;
  }
}

// A tensor walked in memory order.
struct Geometry {
  u64 numel;
  Divider inner;     // elements of the innermost loop
  u64 inner_stride;  // encodings from one of them to the next
  u32 uniform;       // one encoding serves all
  u32 loop_count;
  Loop loops[kMaxLoops];  // around the innermost, innermost first

  // How many of the n elements from start on there are.
  __device__ __forceinline__ u32 count(u64 start, u32 n) const {
    const u64 left = start < numel ? numel - start : 0;
    return left < n ? static_cast<u32>(left) : n;
  }

  __device__ __forceinline__ u64 group_of_row(u64 row) const {
    u64 ignored = 0;
    u64 group = 0;
    locate(loops, loop_count, row, ignored, group);
    return group;
  }
};

// A tensor cut into units of work for a reduction to one value per encoding. Rows are numbered by
// two indices: `kept` moves from encoding to encoding, `reduced` stays with one. The innermost loop
// is either reduced (inner_stride 0: reduce_runs) or kept (reduce_columns).
struct ReducePlan {
  u64 inner;         // elements of the innermost loop
  u64 inner_stride;  // encodings from one of them to the next
  u64 num_groups;
  Divider reduced;   // rows that share their encodings
  Divider parts;     // units of work that a run (or the rows of a column) is cut into
  u64 part_size;     // elements of a run (or rows) in one of them
  Divider tiles;     // reduce_columns: blocks side by side in a row; else 1
  u64 units;         // reduce_runs: units of work altogether
  u32 team;          // threads side by side: of one unit of a run, or along a row
  u32 combine_team;  // threads that add up one encoding's partial results
  u32 direct;        // each encoding has one partial result, which is final
  u32 kept_loops;    // the first loops are the kept ones
  u32 loop_count;
  Loop loops[kMaxLoops];

  // Row and first encoding of the indices (kept, reduced).
  __device__ __forceinline__ void find(u64 kept, u64 reduced_index, u64& row, u64& group) const {
    row = 0;
    group = 0;
    locate(loops, kept_loops, kept, row, group);
    locate(loops + kept_loops, loop_count - kept_loops, reduced_index, row, group);
  }
};

}  // namespace rimet
