// The backward of an op that is linear in its inputs with one coefficient per sample: a scaled copy of the gradient for
// each of them.
#pragma once

#include <array>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/layout.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

// `coefficients(b)` gives one factor per output. An output that is not wanted comes back as an empty tensor of shape
// [0].
template <size_t Count, class Coefficients>
std::array<at::Tensor, Count> scaled_copies(const at::Tensor& grad, const std::array<at::ScalarType, Count>& types,
                                            const std::array<bool, Count>& wanted, Coefficients&& coefficients) {
  SampleLayout layout(grad);
  std::array<at::Tensor, Count> gradients;
  std::vector<size_t> selected;
  for (size_t k = 0; k < Count; ++k) {
    gradients[k] = wanted[k] ? layout.make(types[k]) : at::empty({0}, grad.options());
    if (wanted[k]) selected.push_back(k);
  }
  if (grad.numel() == 0 || selected.empty()) return gradients;

  const int64_t batch = grad.size(0);
  std::vector<std::vector<double>> factors(selected.size(), std::vector<double>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    const auto all = coefficients(b);
    for (size_t k = 0; k < selected.size(); ++k)
      factors[k][b] = all[selected[k]];
  }
  const double* rows[Count];
  Operand outputs[Count];
  bool wide = grad.scalar_type() == at::kDouble;
  for (size_t k = 0; k < selected.size(); ++k) {
    rows[k] = factors[k].data();
    outputs[k] = layout.output(gradients[selected[k]]);
    wide = wide || types[selected[k]] == at::kDouble;
  }
  table().scaled_copies(layout.geometry(), layout.operand(grad), static_cast<int>(selected.size()), rows, outputs,
                        wide);
  return gradients;
}

}  // namespace apex_fast::cpu
