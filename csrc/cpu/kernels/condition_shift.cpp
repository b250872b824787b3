// c_fake = A c + b (APEX, Eq. 9) row by row: a row is the D channels of one token.
#include "cpu/kernels/entries.h"

#include "cpu/kernels/simd.h"
#include "math/condition_shift.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

namespace {

int64_t row_offset(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

template <class C>
const C* read_row(const Rows& rows, int64_t row, int64_t first, int64_t length, Tile<C>& tile) {
  const int64_t offset = row_offset(rows, row) + first * rows.channel_stride;
  if (rows.dtype == arithmetic_dtype<C> && rows.channel_stride == 1) return static_cast<const C*>(rows.data) + offset;
  widen_any(rows.data, rows.dtype, offset, rows.channel_stride, tile.values, length);
  return tile.values;
}

template <class C>
void write_row(const Rows& rows, int64_t row, int64_t first, int64_t length, const C* values) {
  narrow_any(values, rows.data, rows.dtype, row_offset(rows, row) + first * rows.channel_stride, rows.channel_stride,
             length);
}

// Channels [first, first + length) of scale or bias; a single number is spread over the tile.
template <class C>
void read_parameter(const Operand& parameter, bool is_vector, int64_t first, int64_t length, Tile<C>& tile) {
  if (is_vector) {
    widen_any(parameter.data, parameter.dtype, first * parameter.outer_stride, parameter.outer_stride, tile.values,
              length);
  } else {
    C value{};
    widen_any(parameter.data, parameter.dtype, 0, 1, &value, 1);
    std::fill(tile.values, tile.values + length, value);
  }
}

template <class C>
void condition_shift_typed(const ConditionShiftProblem& p, const Rows& out) {
  const int64_t tiles = (p.channels + tile_size - 1) / tile_size;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.channels));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    Tile<C> scale, bias, in, result;
    for (int64_t k = 0; k < tiles;
         ++k) {  // tile of channels outside, rows inside: scale and bias are read once per thread
      const int64_t first = k * tile_size, length = std::min(tile_size, p.channels - first);
      read_parameter(p.scale, p.scale_is_vector, first, length, scale);
      read_parameter(p.bias, p.bias_is_vector, first, length, bias);
      for (int64_t row = begin; row < end; ++row) {
        const C* const c = read_row(p.condition, row, first, length, in);
        if (p.mask && !p.mask[row]) {
          write_row(out, row, first, length, c);
        } else {
          for (int64_t i = 0; i < length; ++i)
            result.values[i] = math::condition_shift(c[i], scale.values[i], bias.values[i]);
          write_row(out, row, first, length, result.values);
        }
      }
    }
  });
}

template <class C>
void condition_shift_backward_typed(const ConditionShiftProblem& p, const Rows& grad, const Rows& grad_condition,
                                    double* partial_scale, double* partial_bias) {
  const int64_t tiles = (p.channels + tile_size - 1) / tile_size;
  const int64_t chunk_rows = rows_per_chunk(p.channels), chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  const int64_t scale_width = p.scale_is_vector ? p.channels : 1, bias_width = p.bias_is_vector ? p.channels : 1;
  at::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    Tile<C> scale, in, grad_in, result;
    double scale_sums[tile_size], bias_sums[tile_size];
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      double scale_total = 0, bias_total = 0;
      const int64_t begin = chunk * chunk_rows, end = std::min(p.rows, begin + chunk_rows);
      for (int64_t k = 0; k < tiles; ++k) {
        const int64_t first = k * tile_size, length = std::min(tile_size, p.channels - first);
        read_parameter(p.scale, p.scale_is_vector, first, length, scale);
        std::fill(scale_sums, scale_sums + length, 0.0);
        std::fill(bias_sums, bias_sums + length, 0.0);
        for (int64_t row = begin; row < end; ++row) {
          const C* const g = read_row(grad, row, first, length, grad_in);
          const bool kept = p.mask && !p.mask[row];
          if (grad_condition.data) {
            if (kept) {
              write_row(grad_condition, row, first, length, g);
            } else {
              for (int64_t i = 0; i < length; ++i)
                result.values[i] = scale.values[i] * g[i];
              write_row(grad_condition, row, first, length, result.values);
            }
          }
          if (kept) continue;
          if (partial_scale) {
            const C* const c = read_row(p.condition, row, first, length, in);
            for (int64_t i = 0; i < length; ++i)
              scale_sums[i] += static_cast<double>(g[i]) * static_cast<double>(c[i]);
          }
          if (partial_bias)
            for (int64_t i = 0; i < length; ++i)
              bias_sums[i] += static_cast<double>(g[i]);
        }
        if (partial_scale && p.scale_is_vector)
          std::copy(scale_sums, scale_sums + length, partial_scale + chunk * scale_width + first);
        if (partial_bias && p.bias_is_vector)
          std::copy(bias_sums, bias_sums + length, partial_bias + chunk * bias_width + first);
        for (int64_t i = 0; i < length; ++i) {
          scale_total += scale_sums[i];
          bias_total += bias_sums[i];
        }
      }
      if (partial_scale && !p.scale_is_vector) partial_scale[chunk] = scale_total;
      if (partial_bias && !p.bias_is_vector) partial_bias[chunk] = bias_total;
    }
  });
}

}  // namespace

void condition_shift(const ConditionShiftProblem& p, const Rows& out) {
  (p.wide ? condition_shift_typed<double> : condition_shift_typed<float>)(p, out);
}

void condition_shift_backward(const ConditionShiftProblem& p, const Rows& grad, const Rows& grad_condition,
                              double* partial_scale, double* partial_bias) {
  (p.wide ? condition_shift_backward_typed<double>
          : condition_shift_backward_typed<float>)(p, grad, grad_condition, partial_scale, partial_bias);
}

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
