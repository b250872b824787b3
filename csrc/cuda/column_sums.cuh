// The second stage of sums over rows: partial sums of chunks of rows, one per column, added up in a fixed order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector_io.cuh"

namespace apex_fast::cuda {

// partials [groups, rows, columns] to out [groups, columns], times a number where there is one.
template <class P>
struct ColumnSums {
  const P* partials;  // nullptr: nothing to do
  int64_t groups;
  int64_t rows;
  int64_t columns;
  void* out;
  DType dtype;
  const void* factor;  // one number; nullptr: 1
  DType factor_dtype;

  __host__ __device__ int64_t blocks_of_group() const { return (columns + warp_size - 1) / warp_size; }
};

template <class P, int Jobs>
struct ColumnSumsJobs {
  ColumnSums<P> job[Jobs];
};

// Block x has 32 columns of one group of the sums that blockIdx.y names. A warp walks down them side by side, so that
// it reads neighbours; then each warp adds up one column.
template <class P, int Jobs>
__global__ void __launch_bounds__(warp_size* warp_size)
    column_sums_kernel(const __grid_constant__ ColumnSumsJobs<P, Jobs> jobs) {
  __shared__ double shared[warp_size][warp_size + 1];  // one more: a column then lies in different banks
  const ColumnSums<P>& sums = jobs.job[blockIdx.y];
  // The grid is as wide as the widest job: the whole block leaves, so nobody waits at the barrier.
  if (!sums.partials || blockIdx.x >= sums.groups * sums.blocks_of_group()) return;
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t group = blockIdx.x / sums.blocks_of_group();
  const int64_t begin = (blockIdx.x - group * sums.blocks_of_group()) * warp_size;
  const P* const partials = sums.partials + group * sums.rows * sums.columns;
  double sum = 0;
  if (begin + x < sums.columns) {
#pragma unroll 4
    for (int64_t row = y; row < sums.rows; row += warp_size)
      sum += static_cast<double>(partials[row * sums.columns + begin + x]);
  }
  shared[y][x] = sum;
  __syncthreads();
  double total = add_lanes(shared[x][y]);
  if (x == 0 && begin + y < sums.columns) {
    if (sums.factor) total *= load_number(sums.factor, sums.factor_dtype, 0);
    store_number(total, sums.out, sums.dtype, group * sums.columns + begin + y);
  }
}

template <class P, int Jobs>
int column_sums(const ColumnSumsJobs<P, Jobs>& jobs, void* stream) {
  int64_t blocks = 0;
  for (const ColumnSums<P>& sums : jobs.job)
    if (sums.partials && sums.groups * sums.blocks_of_group() > blocks) blocks = sums.groups * sums.blocks_of_group();
  if (blocks == 0) return cudaSuccess;
  if (blocks >> 31) return cudaErrorInvalidConfiguration;  // more results than any memory holds
  return launch(column_sums_kernel<P, Jobs>, {static_cast<unsigned>(blocks), Jobs, 1}, {warp_size, warp_size, 1},
                stream, jobs);
}

}  // namespace apex_fast::cuda
