// What the kernels share that cut rows of channels into tiles of channels and chunks of rows (rows.h): a block's
// threads stand side by side over the channels, 8 each, hold the parameters of theirs and walk down the rows.
#pragma once

#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
#include "cuda/vector_io.cuh"

namespace apex_fast::cuda {

// The part of the problem that falls to a thread.
struct Share {
  int64_t first;  // channel
  int count;      // channels, 0 beyond the last
  int64_t begin;  // rows begin, begin + rows_at_once, ... below end
  int64_t end;

  static __device__ __forceinline__ Share of(int64_t rows, int64_t channels, int64_t rows_of_chunk) {
    Share share;
    share.first = (static_cast<int64_t>(blockIdx.x) * tile_slots + threadIdx.x) * slot_size;
    const int64_t left = channels - share.first;
    share.count = left >= slot_size ? slot_size : left > 0 ? static_cast<int>(left) : 0;
    const int64_t top = blockIdx.y * rows_of_chunk;
    share.begin = top + threadIdx.y;
    share.end = top + rows_of_chunk < rows ? top + rows_of_chunk : rows;
    return share;
  }
};

inline dim3 grid_of(const RowChunks& chunks) {
  return {static_cast<unsigned>(chunks.tiles), static_cast<unsigned>(chunks.count), 1};
}

inline dim3 block_of_tiles() {
  return {tile_slots, rows_at_once, 1};
}

// Adds up the sums of the threads above one another, then, for a parameter that is a single number, over the channels.
// All threads of the block come here, those without channels with zeros.
__device__ __forceinline__ void store_partials(const double (&sums)[slot_size], bool is_vector, int64_t channels,
                                               double* partials, double (&shared)[rows_at_once][tile_channels]) {
#pragma unroll
  for (int i = 0; i < slot_size; ++i)
    shared[threadIdx.y][threadIdx.x * slot_size + i] = sums[i];
  __syncthreads();
  const int mine = threadIdx.y * tile_slots + threadIdx.x;  // a channel of the tile
  double total = 0;
#pragma unroll
  for (int y = 0; y < rows_at_once; ++y)
    total += shared[y][mine];
  if (is_vector) {
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * tile_channels + mine;
    if (channel < channels) partials[blockIdx.y * channels + channel] = total;
  } else {
    // Every thread has read its column, and writes into it alone.
    shared[0][mine] = total;
    __syncthreads();
    if (threadIdx.y == 0) {
      const double all = add_lanes(lane_total(shared[0], tile_channels, threadIdx.x));
      if (threadIdx.x == 0) partials[blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x] = all;
    }
  }
  __syncthreads();  // before the caller fills `shared` again
}

}  // namespace apex_fast::cuda
