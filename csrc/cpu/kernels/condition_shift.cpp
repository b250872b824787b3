// c_fake = A c + b (APEX, Eq. 9) row by row: a row is the D channels of one token.
#include <algorithm>

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

// Memory for one number per channel. Not std::vector: its functions have the same names in every instruction set, and
// the linker keeps one of them.
template <class T>
struct Channels {
  explicit Channels(int64_t count) : count(count), values(count ? new T[count] : nullptr) {}
  Channels(const Channels&) = delete;
  Channels& operator=(const Channels&) = delete;
  ~Channels() { delete[] values; }
  void fill(T value) {
    for (int64_t i = 0; i < count; ++i)
      values[i] = value;
  }
  int64_t count;
  T* values;
};

// Channels [first, first + length) of the row at `offset`, in the type of the arithmetic.
template <class C>
const C* read_row(const Rows& rows, int64_t offset, int64_t first, int64_t length, Tile<C>& tile) {
  offset += first * rows.channel_stride;
  if (rows.dtype == arithmetic_dtype<C> && rows.channel_stride == 1) return static_cast<const C*>(rows.data) + offset;
  widen_any(rows.data, rows.dtype, offset, rows.channel_stride, tile.values, length);
  return tile.values;
}

// Where a row is computed: in place, or in `tile` if it has to be converted or scattered on its way.
template <class C>
C* row_target(const Rows& rows, int64_t offset, int64_t first, Tile<C>& tile) {
  if (rows.dtype != arithmetic_dtype<C> || rows.channel_stride != 1) return tile.values;
  return static_cast<C*>(rows.data) + offset + first;
}

template <class C>
void finish_row(const Rows& rows, int64_t offset, int64_t first, int64_t length, const C* values, const Tile<C>& tile) {
  if (values != tile.values) return;
  narrow_any(values, rows.data, rows.dtype, offset + first * rows.channel_stride, rows.channel_stride, length);
}

// Scale or bias in the type of the arithmetic, a single number spread over the channels: made once for a call, so that
// rows can pass from front to back.
template <class C>
struct Spread : Channels<C> {
  Spread(const Operand& parameter, bool is_vector, int64_t channels) : Channels<C>(channels) {
    if (is_vector) {
      widen_any(parameter.data, parameter.dtype, 0, parameter.outer_stride, this->values, channels);
    } else {
      C value{};
      widen_any(parameter.data, parameter.dtype, 0, 1, &value, 1);
      this->fill(value);
    }
  }
};

template <class C>
void condition_shift_typed(const ConditionShiftProblem& p, const Rows& out) {
  const Spread<C> scale(p.scale, p.scale_is_vector, p.channels);
  const Spread<C> bias(p.bias, p.bias_is_vector, p.channels);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.channels));
  at::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    Tile<C> in, result;
    for (int64_t row = begin; row < end; ++row) {
      const bool kept = p.mask && !p.mask[row];
      const int64_t from = row_offset(p.condition, row), to = row_offset(out, row);
      for (int64_t first = 0; first < p.channels; first += tile_size) {
        const int64_t length = std::min(tile_size, p.channels - first);
        const C* const c = read_row(p.condition, from, first, length, in);
        C* const target = row_target(out, to, first, result);
        if (kept) {
          std::copy(c, c + length, target);
        } else {
          const C* const a = scale.values + first;
          const C* const b = bias.values + first;
          for (int64_t i = 0; i < length; ++i)
            target[i] = math::condition_shift(c[i], a[i], b[i]);
        }
        finish_row(out, to, first, length, target, result);
      }
    }
  });
}

// The sums of a chunk of rows: one per channel, or their total for a parameter that is one number.
void store_sums(const Channels<double>& sums, bool is_vector, double* partials, int64_t chunk) {
  if (!partials) return;
  double total = 0;
  for (int64_t i = 0; i < sums.count; ++i) {
    if (is_vector) partials[chunk * sums.count + i] = sums.values[i];
    total += sums.values[i];
  }
  if (!is_vector) partials[chunk] = total;
}

template <class C>
void condition_shift_backward_typed(const ConditionShiftProblem& p, const Rows& grad, const Rows& grad_condition,
                                    double* partial_scale, double* partial_bias) {
  const Spread<C> scale(p.scale, p.scale_is_vector, p.channels);
  const int64_t chunk_rows = rows_per_chunk(p.channels), chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  at::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    Tile<C> in, grad_in, result;
    Channels<double> scale_sums(partial_scale ? p.channels : 0), bias_sums(partial_bias ? p.channels : 0);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int64_t begin = chunk * chunk_rows, end = std::min(p.rows, begin + chunk_rows);
      scale_sums.fill(0.0);
      bias_sums.fill(0.0);
      for (int64_t row = begin; row < end; ++row) {
        const bool kept = p.mask && !p.mask[row];
        const int64_t from = row_offset(grad, row), condition = row_offset(p.condition, row);
        const int64_t to = grad_condition.data ? row_offset(grad_condition, row) : 0;
        for (int64_t first = 0; first < p.channels; first += tile_size) {
          const int64_t length = std::min(tile_size, p.channels - first);
          const C* const g = read_row(grad, from, first, length, grad_in);
          if (grad_condition.data) {
            C* const target = row_target(grad_condition, to, first, result);
            const C* const a = scale.values + first;
            for (int64_t i = 0; i < length; ++i)
              target[i] = kept ? g[i] : a[i] * g[i];
            finish_row(grad_condition, to, first, length, target, result);
          }
          if (kept) continue;
          if (partial_scale) {
            const C* const c = read_row(p.condition, condition, first, length, in);
            double* const sums = scale_sums.values + first;
            for (int64_t i = 0; i < length; ++i)
              sums[i] += static_cast<double>(g[i]) * static_cast<double>(c[i]);
          }
          if (partial_bias) {
            double* const sums = bias_sums.values + first;
            for (int64_t i = 0; i < length; ++i)
              sums[i] += static_cast<double>(g[i]);
          }
        }
      }
      store_sums(scale_sums, p.scale_is_vector, partial_scale, chunk);
      store_sums(bias_sums, p.bias_is_vector, partial_bias, chunk);
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
