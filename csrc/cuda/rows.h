// How condition_shift cuts a condition [..., D]: rows of D channels, in tiles of channels and chunks of rows.
// Arithmetic only, as slots.h.
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

// The grid: tiles of channels by chunks of rows. As in slots.h, the problem alone decides.
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

}  // namespace apex_fast::cuda
