// The second stage of a reduction: the chunks of each sample, added up in order.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace apex_fast::cpu {

struct PartialSums {
  PartialSums(const Geometry& geometry, int64_t count)
      : batch(geometry.batch), chunks(chunks_per_sample(geometry)), count(count), values(batch * chunks * count) {}

  double total(int64_t b, int64_t k) const {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum += values[(b * chunks + chunk) * count + k];
    return sum;
  }

  int64_t batch, chunks, count;
  std::vector<double> values;  // [batch, chunks, count]
};

// upstream[b] * factor as double
inline std::vector<double> per_sample(const at::Tensor& upstream, double factor) {
  const Times values = times_of(upstream);
  std::vector<double> result(upstream.size(0));
  for (int64_t b = 0; b < upstream.size(0); ++b)
    result[b] = factor * time_at(values, b);
  return result;
}

}  // namespace apex_fast::cpu
