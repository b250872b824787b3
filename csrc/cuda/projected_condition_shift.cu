// What a linear layer makes of c and of a c + b, from one read of W c (APEX, Eq. 9), and the gradients from one read of
// those of both. No sum over a row is needed, so rows are cut as in condition_shift.cu.
#include "cuda/column_sums.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/row_tiles.cuh"
#include "cuda/vector_io.cuh"
#include "math/projected_condition_shift.h"

namespace apex_fast::cuda {

namespace {

__device__ __forceinline__ double channel(const Operand& parameter, int64_t index) {
  return load_number(parameter.data, parameter.dtype, index * parameter.outer_stride);
}

struct ForwardProblem {
  ProjectedConditionShiftProblem shift;
  Operand out[2];  // real, shifted; one without data is not written
  int64_t rows_of_chunk;
};

template <class C>
__global__ void __launch_bounds__(block_size, blocks_at_once<C>)
    projected_condition_shift_kernel(const __grid_constant__ ForwardProblem p) {
  const ProjectedConditionShiftProblem& shift = p.shift;
  const Share share = Share::of(shift.rows, shift.channels, p.rows_of_chunk);
  if (share.count == 0) return;  // there is no barrier in this kernel
  const C scale = static_cast<C>(channel(shift.scale, 0));
  const double bias = channel(shift.bias, 0);
  C linear_bias[slot_size], offset[slot_size];
#pragma unroll
  for (int i = 0; i < slot_size; ++i) {
    const bool there = i < share.count;
    const double beta = there && shift.linear_bias.data ? channel(shift.linear_bias, share.first + i) : 0.0;
    linear_bias[i] = static_cast<C>(beta);
    offset[i] = there ? static_cast<C>(bias * channel(shift.row_sums, share.first + i) + beta) : C(0);
  }
#pragma unroll 1
  for (int64_t row = share.begin; row < share.end; row += rows_at_once) {
    const int64_t place = row * shift.channels + share.first;
    Raw<C> raw;
    load(raw, shift.projected.data, shift.projected.dtype, place, 1, share.count);
    const bool kept = shift.mask && __ldg(shift.mask + row) == 0;
    C projected[slot_size], values[slot_size];
    widen(raw, shift.projected.dtype, projected);
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] = math::projected_real(projected[i], linear_bias[i]);
    if (p.out[0].data) store(values, p.out[0].data, p.out[0].dtype, place, 1, share.count);
    if (!p.out[1].data) continue;
    if (!kept) {
#pragma unroll
      for (int i = 0; i < slot_size; ++i)
        values[i] = math::projected_shift(projected[i], scale, offset[i]);
    }
    store(values, p.out[1].data, p.out[1].dtype, place, 1, share.count);
  }
}

struct BackwardProblem {
  ProjectedConditionShiftProblem shift;  // its projection may be absent
  Operand grad_real, grad_shifted;       // one of them may be absent
  Operand grad_projected;                // may be absent
  // partial sums over the rows of a chunk, nullptr: not wanted
  double* product;   // [chunks, tiles], grad_shifted * projected
  double* weighted;  // [chunks, tiles], grad_shifted * row_sums
  double* shifted;   // [chunks, channels], grad_shifted
  double* all;       // [chunks, channels], grad_real + grad_shifted of every token
  int64_t rows_of_chunk;
};

template <class C>
__global__ void __launch_bounds__(block_size)
    projected_condition_shift_backward_kernel(const __grid_constant__ BackwardProblem p) {
  __shared__ double shared[rows_at_once][tile_channels];
  const ProjectedConditionShiftProblem& shift = p.shift;
  const Share share = Share::of(shift.rows, shift.channels, p.rows_of_chunk);
  const C scale = static_cast<C>(channel(shift.scale, 0));
  double product_sums[slot_size] = {}, shifted_sums[slot_size] = {}, all_sums[slot_size] = {};
  // A thread without channels has no rows either, and goes on to the barriers.
#pragma unroll 1
  for (int64_t row = share.begin; row < share.end && share.count > 0; row += rows_at_once) {
    const int64_t place = row * shift.channels + share.first;
    const bool kept = shift.mask && __ldg(shift.mask + row) == 0;
    // A token that is not shifted says nothing about the shift, whatever stands in it.
    const bool wants_projected = p.product && !kept;
    Raw<C> raw_real, raw_shifted, raw_projected;
    load(raw_real, p.grad_real.data, p.grad_real.dtype, place, 1, p.grad_real.data ? share.count : 0);
    load(raw_shifted, p.grad_shifted.data, p.grad_shifted.dtype, place, 1, p.grad_shifted.data ? share.count : 0);
    load(raw_projected, shift.projected.data, shift.projected.dtype, place, 1, wants_projected ? share.count : 0);
    C real[slot_size], shifted[slot_size], projected[slot_size];
    widen(raw_real, p.grad_real.dtype, real);
    widen(raw_shifted, p.grad_shifted.dtype, shifted);
    widen(raw_projected, shift.projected.dtype, projected);
    if (p.all) {
#pragma unroll
      for (int i = 0; i < slot_size; ++i)
        all_sums[i] += static_cast<double>(real[i] + shifted[i]);
    }
    if (!kept) {
#pragma unroll
      for (int i = 0; i < slot_size; ++i) {
        // Sums over all tokens are formed in fp64, products included, and rounded once at the end.
        if (p.product) product_sums[i] += static_cast<double>(shifted[i]) * static_cast<double>(projected[i]);
        if (p.weighted || p.shifted) shifted_sums[i] += static_cast<double>(shifted[i]);
      }
    }
    if (p.grad_projected.data) {
      const C factor = kept ? C(1) : scale;
#pragma unroll
      for (int i = 0; i < slot_size; ++i)
        real[i] = math::projected_shift_backward(real[i], shifted[i], factor);
      store(real, p.grad_projected.data, p.grad_projected.dtype, place, 1, share.count);
    }
  }
  if (p.product) store_partials(product_sums, false, shift.channels, p.product, shared);
  if (p.all) store_partials(all_sums, true, shift.channels, p.all, shared);
  if (p.shifted) store_partials(shifted_sums, true, shift.channels, p.shifted, shared);
  if (p.weighted) {
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      shifted_sums[i] *= i < share.count ? channel(shift.row_sums, share.first + i) : 0.0;
    store_partials(shifted_sums, false, shift.channels, p.weighted, shared);
  }
}

ColumnSums<double> sums_of(const ColumnGradient& gradient, const RowChunks& chunks, int64_t channels) {
  const bool v = gradient.is_vector;
  return {static_cast<const double*>(gradient.partials),
          1,
          v ? chunks.count : chunks.count * chunks.tiles,
          v ? channels : 1,
          gradient.out,
          gradient.dtype,
          nullptr,
          DType::F32};
}

}  // namespace

int projected_condition_shift(const ProjectedConditionShiftProblem& problem, const Operand& real,
                              const Operand& shifted, void* stream) {
  const RowChunks chunks = row_chunks(problem.rows, problem.channels);
  const ForwardProblem p{problem, {real, shifted}, chunks.rows};
  const auto kernel = problem.wide ? projected_condition_shift_kernel<double> : projected_condition_shift_kernel<float>;
  return launch(kernel, grid_of(chunks), block_of_tiles(), stream, p);
}

int projected_condition_shift_backward(const ProjectedConditionShiftProblem& problem, const Operand& grad_real,
                                       const Operand& grad_shifted, const Operand& grad_projected,
                                       const ColumnGradient (&gradients)[4], void* stream) {
  const RowChunks chunks = row_chunks(problem.rows, problem.channels);
  const auto partials = [&](int k) { return static_cast<double*>(gradients[k].partials); };
  const BackwardProblem p{problem,     grad_real,   grad_shifted, grad_projected, partials(0),
                          partials(1), partials(2), partials(3),  chunks.rows};
  const auto kernel = problem.wide ? projected_condition_shift_backward_kernel<double>
                                   : projected_condition_shift_backward_kernel<float>;
  const int launched = launch(kernel, grid_of(chunks), block_of_tiles(), stream, p);
  if (launched != cudaSuccess) return launched;
  ColumnSumsJobs<double, 4> jobs{};
  for (int k = 0; k < 4; ++k)
    jobs.job[k] = sums_of(gradients[k], chunks, problem.channels);
  // W 1 enters as b W 1
  jobs.job[2].factor = problem.bias.data;
  jobs.job[2].factor_dtype = problem.bias.dtype;
  return column_sums(jobs, stream);
}

}  // namespace apex_fast::cuda
