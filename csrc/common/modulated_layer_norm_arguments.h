// Argument checks of modulated_layer_norm and its backward, for every device, and what their kernels are told.
#pragma once

#include <utility>

#include "common/row_problems.h"
#include "common/rows.h"

namespace apex_fast {

inline void check_modulation(const char* op, const char* name, const at::Tensor& values, const at::Tensor& hidden) {
  check_float(op, name, values);
  TORCH_CHECK(values.dim() == 2 && values.size(0) == hidden.size(0) && values.size(1) == hidden.size(-1), op, ": ",
              name, " must be [B, D] = [", hidden.size(0), ", ", hidden.size(-1),
              "], batch and channels of hidden, got ", values.sizes());
  check_device(op, name, values, "hidden", hidden);
}

inline void check_hidden(const char* op, const at::Tensor& hidden) {
  check_float(op, "hidden", hidden);
  TORCH_CHECK(hidden.dim() >= 2, op, ": hidden must be [B, ..., D], got ", hidden.sizes());
}

inline at::ScalarType row_statistics_type(const at::Tensor& hidden) {
  return hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_modulated_layer_norm(const at::Tensor& hidden, const at::Tensor& scale, const at::Tensor& shift,
                                       double eps) {
  constexpr auto op = "modulated_layer_norm";
  check_hidden(op, hidden);
  check_modulation(op, "scale", scale, hidden);
  check_modulation(op, "shift", shift, hidden);
  check_eps(op, eps);
}

inline void check_modulated_layer_norm_backward(const at::Tensor& grad, const at::Tensor& hidden,
                                                const at::Tensor& scale, const at::Tensor& mean, const at::Tensor& rstd,
                                                at::ScalarType shift_dtype) {
  constexpr auto op = "modulated_layer_norm_backward";
  check_hidden(op, hidden);
  check_sample(op, "grad", grad, "hidden", hidden);
  check_modulation(op, "scale", scale, hidden);
  check_float_type(op, "shift_dtype", shift_dtype);
  const auto type = row_statistics_type(hidden);
  const auto rows = hidden.sizes().slice(0, hidden.dim() - 1);
  for (const auto& [name, values] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    TORCH_CHECK(values->sizes() == rows && values->scalar_type() == type, op, ": ", name, " must be ", type, " ", rows,
                ", as modulated_layer_norm returned it, got ", values->scalar_type(), " ", values->sizes());
    check_device(op, name, *values, "hidden", hidden);
  }
}

// `dense` is what the problem points into.
inline ModulatedLayerNormProblem layer_norm_problem(const at::Tensor& dense, const at::Tensor& scale,
                                                    const at::Tensor& shift, double eps) {
  const int64_t batch = dense.size(0), channels = dense.size(-1);
  return {batch,
          batch * channels > 0 ? dense.numel() / (batch * channels) : 0,
          channels,
          dense_rows(dense),
          per_channel(scale),
          per_channel(shift),
          eps,
          dense.scalar_type() == at::kDouble};
}

}  // namespace apex_fast
