// c_fake = A c + b (APEX, Eq. 9) on the rows of a condition [..., D], and its gradients.
//
// A block has a tile of channels and a chunk of rows: its threads stand side by side over the channels, 8 each, and
// hold scale and bias of theirs while they walk down the rows.
#include "cuda/column_sums.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/row_tiles.cuh"
#include "cuda/vector_io.cuh"
#include "math/condition_shift.h"

namespace apex_fast::cuda {

namespace {

template <class C>
__device__ __forceinline__ void load_parameter(const Parameter& parameter, int64_t first, int count,
                                               C (&values)[slot_size]) {
  if (!parameter.is_vector) {
    const C value = static_cast<C>(load_number(parameter.data, parameter.dtype, 0));
#pragma unroll
    for (int i = 0; i < slot_size; ++i)
      values[i] = value;
    return;
  }
#pragma unroll
  for (int i = 0; i < slot_size; ++i)
    values[i] =
        i < count ? static_cast<C>(load_number(parameter.data, parameter.dtype, (first + i) * parameter.stride)) : C(0);
}

struct ForwardProblem {
  ConditionShift shift;
  RowOperand operands[2];  // condition, out
  int64_t rows_of_chunk;
};

template <class C>
__global__ void __launch_bounds__(block_size, blocks_at_once<C>)
    condition_shift_kernel(const __grid_constant__ ForwardProblem p) {
  const Share share = Share::of(p.shift.rows, p.shift.channels, p.rows_of_chunk);
  if (share.count == 0) return;  // there is no barrier in this kernel
  C scale[slot_size], bias[slot_size];
  load_parameter(p.shift.scale, share.first, share.count, scale);
  load_parameter(p.shift.bias, share.first, share.count, bias);
  constexpr int together = 2;  // rows whose loads are in flight at once
  for (int64_t row = share.begin; row < share.end; row += together * rows_at_once) {
    int64_t offsets[together][2];
    Raw<C> raw[together];
    bool kept[together];
#pragma unroll
    for (int r = 0; r < together; ++r) {
      const int64_t at = row + r * rows_at_once;
      if (at >= share.end) break;
      p.shift.dims.offsets(p.operands, at, offsets[r]);
      const RowOperand& condition = p.operands[0];
      load(raw[r], condition.data, condition.dtype, offsets[r][0] + share.first * condition.channel_stride,
           condition.channel_stride, share.count);
      kept[r] = p.shift.mask && __ldg(p.shift.mask + at) == 0;
    }
#pragma unroll
    for (int r = 0; r < together; ++r) {
      if (row + r * rows_at_once >= share.end) break;
      C values[slot_size];
      widen(raw[r], p.operands[0].dtype, values);
      if (!kept[r]) {
#pragma unroll
        for (int i = 0; i < slot_size; ++i)
          values[i] = math::condition_shift(values[i], scale[i], bias[i]);
      }
      const RowOperand& out = p.operands[1];
      store(values, out.data, out.dtype, offsets[r][1] + share.first * out.channel_stride, out.channel_stride,
            share.count);
    }
  }
}

struct BackwardProblem {
  ConditionShift shift;
  RowOperand operands[3];  // condition, grad, grad_condition (may be absent)
  double* partial_scale;   // [chunks, D] or [chunks, tiles], nullptr: not wanted
  double* partial_bias;
  int64_t rows_of_chunk;
};

template <class C>
__global__ void __launch_bounds__(block_size)
    condition_shift_backward_kernel(const __grid_constant__ BackwardProblem p) {
  __shared__ double shared[rows_at_once][tile_channels];
  const Share share = Share::of(p.shift.rows, p.shift.channels, p.rows_of_chunk);
  const RowOperand &condition = p.operands[0], &grad = p.operands[1], &grad_condition = p.operands[2];
  C scale[slot_size];
  load_parameter(p.shift.scale, share.first, share.count, scale);
  double scale_sums[slot_size] = {}, bias_sums[slot_size] = {};
  // A thread without channels has no rows either, and goes on to the barriers.
  for (int64_t row = share.begin; row < share.end && share.count > 0; row += rows_at_once) {
    int64_t offsets[3];
    p.shift.dims.offsets(p.operands, row, offsets);
    Raw<C> raw_grad, raw_condition;
    load(raw_grad, grad.data, grad.dtype, offsets[1] + share.first * grad.channel_stride, grad.channel_stride,
         share.count);
    if (p.partial_scale)
      load(raw_condition, condition.data, condition.dtype, offsets[0] + share.first * condition.channel_stride,
           condition.channel_stride, share.count);
    const bool kept = p.shift.mask && __ldg(p.shift.mask + row) == 0;
    C g[slot_size];
    widen(raw_grad, grad.dtype, g);
    if (!kept) {
      // Sums over all tokens are formed in fp64, products included, and rounded once at the end.
      if (p.partial_scale) {
        C c[slot_size];
        widen(raw_condition, condition.dtype, c);
#pragma unroll
        for (int i = 0; i < slot_size; ++i)
          scale_sums[i] += static_cast<double>(g[i]) * static_cast<double>(c[i]);
      }
      if (p.partial_bias) {
#pragma unroll
        for (int i = 0; i < slot_size; ++i)
          bias_sums[i] += static_cast<double>(g[i]);
      }
#pragma unroll
      for (int i = 0; i < slot_size; ++i)
        g[i] *= scale[i];
    }
    if (grad_condition.data)
      store(g, grad_condition.data, grad_condition.dtype, offsets[2] + share.first * grad_condition.channel_stride,
            grad_condition.channel_stride, share.count);
  }
  if (p.partial_scale) store_partials(scale_sums, p.shift.scale.is_vector, p.shift.channels, p.partial_scale, shared);
  if (p.partial_bias) store_partials(bias_sums, p.shift.bias.is_vector, p.shift.channels, p.partial_bias, shared);
}

// A single number is the one column of as many rows as there are blocks.
ColumnSums<double> sums_of(const ParameterGradient& gradient, const Parameter& parameter, const RowChunks& chunks,
                           int64_t channels) {
  const bool v = parameter.is_vector;
  return {gradient.partials,
          1,
          v ? chunks.count : chunks.count * chunks.tiles,
          v ? channels : 1,
          gradient.out,
          parameter.dtype,
          nullptr,
          DType::F32};
}

}  // namespace

int condition_shift(const ConditionShift& problem, const RowOperand& condition, const RowOperand& out, bool wide,
                    void* stream) {
  const RowChunks chunks = row_chunks(problem.rows, problem.channels);
  const ForwardProblem p{problem, {condition, out}, chunks.rows};
  const auto kernel = wide ? condition_shift_kernel<double> : condition_shift_kernel<float>;
  return launch(kernel, grid_of(chunks), block_of_tiles(), stream, p);
}

int condition_shift_backward(const ConditionShift& problem, const RowOperand& condition, const RowOperand& grad,
                             const RowOperand& grad_condition, const ParameterGradient& grad_scale,
                             const ParameterGradient& grad_bias, bool wide, void* stream) {
  const RowChunks chunks = row_chunks(problem.rows, problem.channels);
  const BackwardProblem p{
      problem, {condition, grad, grad_condition}, grad_scale.partials, grad_bias.partials, chunks.rows};
  const auto kernel = wide ? condition_shift_backward_kernel<double> : condition_shift_backward_kernel<float>;
  const int launched = launch(kernel, grid_of(chunks), block_of_tiles(), stream, p);
  if (launched != cudaSuccess) return launched;
  return column_sums<double, 2>({{sums_of(grad_scale, problem.scale, chunks, problem.channels),
                                  sums_of(grad_bias, problem.bias, chunks, problem.channels)}},
                                stream);
}

}  // namespace apex_fast::cuda
