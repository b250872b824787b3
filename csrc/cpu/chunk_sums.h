// The second stage of the reductions over rows: chunks added up in order.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cpu/kernels.h"

namespace apex_fast::cpu {

inline int64_t chunks_of_rows(int64_t rows, int64_t channels) {
  const int64_t per_chunk = rows_per_chunk(channels);
  return (rows + per_chunk - 1) / per_chunk;
}

// [groups, chunks, channels] fp64, empty where the sums are not wanted
class ChunkSums {
 public:
  ChunkSums(int64_t groups, int64_t chunks, int64_t channels, bool wanted)
      : groups_(groups), chunks_(chunks), channels_(channels), values_(wanted ? groups * chunks * channels : 0) {}

  double* data() { return values_.empty() ? nullptr : values_.data(); }

  std::vector<double> totals(int64_t group = 0) const {
    std::vector<double> sums(channels_);
    const double* chunk = values_.data() + group * chunks_ * channels_;
    for (int64_t k = 0; k < chunks_ && !values_.empty(); ++k, chunk += channels_)
      for (int64_t i = 0; i < channels_; ++i)
        sums[i] += chunk[i];
    return sums;
  }

  // All groups, [groups, channels], or their one group as a tensor like `parameter`: per channel, or one number.
  at::Tensor to_tensor(const at::Tensor& parameter) const {
    at::Tensor sums = at::empty(parameter.sizes(), parameter.options().dtype(at::kDouble)).zero_();
    double* const out = sums.mutable_data_ptr<double>();
    const int64_t width = parameter.numel();
    for (int64_t group = 0; group < groups_; ++group) {
      const std::vector<double> row = totals(group);
      for (int64_t i = 0; i < channels_; ++i)
        out[width == 1 && parameter.dim() == 0 ? 0 : group * channels_ + i] += row[i];
    }
    return sums.to(parameter.scalar_type());
  }

 private:
  int64_t groups_, chunks_, channels_;
  std::vector<double> values_;
};

}  // namespace apex_fast::cpu
