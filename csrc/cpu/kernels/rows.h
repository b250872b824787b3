// Whole rows of channels in the arithmetic type, for ops that need a sum over a row before they can write it: a row is
// converted once and then stays in the cache for the second pass.
#pragma once

#include <array>
#include <utility>

#include "cpu/kernels/simd.h"

namespace apex_fast::cpu::APEX_ISA_NAMESPACE {

// Memory for one number per channel, zero at first. Not std::vector: its functions have the same names in every
// instruction set, and the linker keeps one of them.
template <class T>
class ChannelBuffer {
 public:
  explicit ChannelBuffer(int64_t count = 0) : count_(count), values_(count > 0 ? new T[count]() : nullptr) {}
  ChannelBuffer(ChannelBuffer&& other) noexcept
      : count_(std::exchange(other.count_, 0)), values_(std::exchange(other.values_, nullptr)) {}
  ChannelBuffer& operator=(ChannelBuffer&& other) noexcept {
    std::swap(count_, other.count_);
    std::swap(values_, other.values_);
    return *this;
  }
  ~ChannelBuffer() { delete[] values_; }

  int64_t size() const { return count_; }
  T* data() { return values_; }
  const T* data() const { return values_; }

 private:
  int64_t count_;
  T* values_;
};

// Reads and writes rows of dense [rows, channels] tensors; one per operand and thread.
template <class C>
class RowBuffer {
 public:
  explicit RowBuffer(int64_t channels) : values_(channels) {}

  const C* read(const Operand& rows, int64_t row) {
    const int64_t channels = values_.size();
    if (rows.dtype == arithmetic_dtype<C>) return static_cast<const C*>(rows.data) + row * channels;
    widen_any(rows.data, rows.dtype, row * channels, 1, values_.data(), channels);
    return values_.data();
  }

  // Where row `row` is computed; finish() stores it if that is not its place in the output already.
  C* target(const Operand& rows, int64_t row) {
    if (rows.dtype == arithmetic_dtype<C>) return static_cast<C*>(rows.data) + row * values_.size();
    return values_.data();
  }
  void finish(const Operand& rows, int64_t row) const {
    const int64_t channels = values_.size();
    if (rows.dtype != arithmetic_dtype<C>)
      narrow_any(values_.data(), rows.data, rows.dtype, row * channels, 1, channels);
  }

 private:
  ChannelBuffer<C> values_;
};

// One number per channel, `outer_stride` apart; a stride of 0 spreads a single number.
template <class C>
static ChannelBuffer<C> channel_values(const Operand& parameter, int64_t channels, int64_t offset = 0) {
  ChannelBuffer<C> values(channels);
  if (parameter.data)
    widen_any(parameter.data, parameter.dtype, offset, parameter.outer_stride, values.data(), channels);
  return values;
}

// Sums over a row, `body(vectors, sums)` adding to `Count` of them: SIMD lanes within a tile, doubles across tiles.
template <class C, int Count, int In, class Body>
static std::array<double, Count> row_sums(const C* const (&in)[In], int64_t channels, Body&& body) {
  LaneTotals<C, Count> totals;
  for (int64_t first = 0; first < channels; first += tile_size) {
    const C* tile[In];
    for (int k = 0; k < In; ++k)
      tile[k] = in[k] + first;
    Vec<C> sums[Count];
    for (int k = 0; k < Count; ++k)
      sums[k] = Vec<C>(C(0));
    visit_tile<C, In>(tile, std::min(tile_size, channels - first), [&](const Vec<C>(&v)[In]) { body(v, sums); });
    for (int k = 0; k < Count; ++k)
      totals.add(k, sums[k]);
  }
  std::array<double, Count> result;
  for (int k = 0; k < Count; ++k)
    result[k] = totals.total(k);
  return result;
}

// Sums over rows, one per channel: in the arithmetic type over a few rows, then in double, so that long sums do not
// drift and the inner loop stays vectorised.
template <class C>
class ColumnSums {
 public:
  ColumnSums(int64_t channels, bool wanted) : recent_(wanted ? channels : 0), totals_(wanted ? channels : 0) {}

  bool wanted() const { return recent_.size() > 0; }
  C* recent() { return recent_.data(); }

  void row_done() {
    if (++rows_ == rows_between_flushes) flush();
  }

  // Moves the sums of a chunk to `partial` and starts the next one.
  void store(double* partial) {
    flush();
    double* const totals = totals_.data();
    for (int64_t i = 0; i < totals_.size(); ++i) {
      partial[i] = totals[i];
      totals[i] = 0;
    }
  }

 private:
  static constexpr int rows_between_flushes = 16;

  void flush() {
    C* const recent = recent_.data();
    double* const totals = totals_.data();
    for (int64_t i = 0; i < recent_.size(); ++i) {
      totals[i] += static_cast<double>(recent[i]);
      recent[i] = C(0);
    }
    rows_ = 0;
  }

  ChannelBuffer<C> recent_;
  ChannelBuffer<double> totals_;
  int rows_ = 0;
};

}  // namespace apex_fast::cpu::APEX_ISA_NAMESPACE
