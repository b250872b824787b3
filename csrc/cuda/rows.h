// How the row ops cut tensors [..., D] of rows of D channels. Ops that look at every element by itself take tiles of
// channels and chunks of rows; ops that need a sum over a row take whole rows. Arithmetic only, as slots.h.
#pragma once

#include "cuda/slots.h"

namespace apex_fast::cuda {

constexpr int max_row_dims = 8;
constexpr int tile_slots = 32;                         // a warp side by side
constexpr int tile_channels = tile_slots * slot_size;  // channels of a block
constexpr int rows_at_once = block_size / tile_slots;  // rows that a block works on at a time
static_assert(tile_channels == block_size, "the end of the backward kernel gives every thread one channel of the tile");

// A tensor [..., D] as the kernels see it; dimension 0 is the fastest of the leading ones.
struct RowOperand {
  void* data = nullptr;  // nullptr: absent
  DType dtype = DType::F32;
  int64_t channel_stride = 1;  // in elements, as all strides
  int64_t strides[max_row_dims] = {};
};

// The leading dimensions that all operands share.
struct RowDims {
  int dims = 0;
  Divider sizes[max_row_dims];

  // Offset of a row in each operand.
  template <int N>
  APEX_HD void offsets(const RowOperand (&operands)[N], int64_t row, int64_t (&result)[N]) const {
    for (int k = 0; k < N; ++k)
      result[k] = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll  // an index that is no constant would move the operands to local memory
#endif
    for (int d = 0; d < max_row_dims; ++d) {
      if (d >= dims) break;
      const int64_t next = d + 1 < dims ? sizes[d].divide(row) : 0;
      const int64_t here = row - next * sizes[d].divisor;
      for (int k = 0; k < N; ++k)
        result[k] += here * operands[k].strides[d];
      row = next;
    }
  }
};

// Leaves out dimensions of one row and joins neighbours that every operand walks as one, so that the usual condition
// [B, L, D] has one leading dimension and needs no division. `sizes` and `strides[k]` have `dims` numbers, slowest
// first; the operands' own strides are filled in here.
template <int N>
RowDims join_dims(int dims, const int64_t* sizes, const int64_t* const (&strides)[N], RowOperand (&operands)[N]) {
  RowDims rows;
  for (int d = dims - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    bool joined = rows.dims > 0;
    for (int k = 0; k < N && joined; ++k) {
      const int last = rows.dims - 1;
      joined = strides[k][d] == operands[k].strides[last] * rows.sizes[last].divisor;
    }
    if (joined) {
      rows.sizes[rows.dims - 1] = Divider(rows.sizes[rows.dims - 1].divisor * sizes[d]);
      continue;
    }
    rows.sizes[rows.dims] = Divider(sizes[d]);
    for (int k = 0; k < N; ++k)
      operands[k].strides[rows.dims] = strides[k][d];
    ++rows.dims;
  }
  return rows;
}

// ---- tiles of channels by chunks of rows. As in slots.h, the problem alone decides.

struct RowChunks {
  int64_t tiles = 0;
  int64_t rows = 0;  // of a chunk
  int64_t count = 0;
};

inline RowChunks row_chunks(int64_t rows, int64_t channels) {
  constexpr int64_t enough_blocks = 1024;
  RowChunks chunks;
  chunks.tiles = ceil_divide(channels, tile_channels);
  const int64_t wanted = chunks.tiles < enough_blocks ? enough_blocks / chunks.tiles : 1;
  chunks.rows = ceil_divide(ceil_divide(rows, wanted), rows_at_once) * rows_at_once;
  chunks.count = ceil_divide(rows, chunks.rows);
  return chunks;
}

// fp64 numbers of workspace for the gradient of one parameter: [chunks, D], or [chunks, tiles] for a single number.
inline int64_t parameter_partials(const RowChunks& chunks, int64_t channels, bool is_vector) {
  return chunks.count * (is_vector ? channels : chunks.tiles);
}

// ---- whole rows

// Threads that a block has at most, and the channels that they hold in registers, a slot each; longer rows are read
// more than once, by half as many threads. In fp64 a slot takes twice the registers.
template <class C>
constexpr int most_row_threads = sizeof(C) == 4 ? 512 : 256;
template <class C>
constexpr int64_t held_channels = most_row_threads<C> * slot_size;

// Whole warps.
template <class C>
constexpr int row_threads(int64_t channels) {
  if (channels >= held_channels<C>) return most_row_threads<C>;
  return static_cast<int>(ceil_divide(ceil_divide(channels, slot_size), warp_size) * warp_size);
}

// A block works on a task, some rows of one group, one after the other. The rows of a task are few: the sums over them
// are formed in the arithmetic type, their number is that of the partial sums, and where rows are read more than once
// the statistics of all of them lie in shared memory.
struct RowTasks {
  static constexpr int most_rows = 32;
  Divider per_group;  // tasks
  int64_t rows_of_group = 0;
  int64_t rows = 0;   // of a task
  int64_t count = 0;  // tasks of all groups
};

// With partial sums, blocks beyond what fills a GPU cost memory traffic: every one of them writes a row of sums.
inline RowTasks row_tasks(int64_t groups, int64_t rows_of_group, bool partial_sums) {
  const int64_t enough_blocks = partial_sums ? 256 : 2048;
  RowTasks tasks;
  tasks.rows_of_group = rows_of_group;
  tasks.rows = ceil_divide(groups * rows_of_group, enough_blocks);
  if (tasks.rows > RowTasks::most_rows) tasks.rows = RowTasks::most_rows;
  if (tasks.rows > rows_of_group) tasks.rows = rows_of_group;
  tasks.per_group = Divider(ceil_divide(rows_of_group, tasks.rows));
  tasks.count = groups * tasks.per_group.divisor;
  return tasks;
}

// Numbers of workspace, in the arithmetic type, for one sum per channel or one number: [groups, tasks, D] or [tasks].
inline int64_t row_partials(const RowTasks& tasks, int64_t channels, bool is_vector) {
  return tasks.count * (is_vector ? channels : 1);
}

}  // namespace apex_fast::cuda
