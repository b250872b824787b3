// Argument checks of condition_shift_rms_norm and its backward, for every device, and what their kernels are told.
#pragma once

#include <array>
#include <optional>

#include "common/row_problems.h"
#include "common/rows.h"

namespace apex_fast {

inline void check_normed_condition(const char* op, const at::Tensor& condition, const at::Tensor& scale,
                                   const at::Tensor& bias, const at::Tensor& weight, double eps,
                                   const std::optional<at::Tensor>& mask) {
  check_rows(op, "condition", condition);
  check_number_or_channels(op, "scale", scale, "condition", condition);
  check_number_or_channels(op, "bias", bias, "condition", condition);
  check_channels(op, "weight", weight, "condition", condition);
  check_mask(op, mask, "condition", condition);
  check_eps(op, eps);
}

inline void check_condition_shift_rms_norm(const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias,
                                           const at::Tensor& weight, double eps, const std::optional<at::Tensor>& mask,
                                           bool stacked, std::array<bool, 2> output_mask) {
  constexpr auto op = "condition_shift_rms_norm";
  check_normed_condition(op, condition, scale, bias, weight, eps, mask);
  check_branches(op, "condition", condition, stacked, output_mask);
}

inline void check_condition_shift_rms_norm_backward(const std::optional<at::Tensor>& grad_normed,
                                                    const std::optional<at::Tensor>& grad_shifted,
                                                    const at::Tensor& condition, const at::Tensor& scale,
                                                    const at::Tensor& bias, const at::Tensor& weight, double eps,
                                                    const std::optional<at::Tensor>& mask, bool stacked) {
  constexpr auto op = "condition_shift_rms_norm_backward";
  check_normed_condition(op, condition, scale, bias, weight, eps, mask);
  check_branches(op, "condition", condition, stacked, {true, true});
  check_branch_gradients(op, grad_normed, "grad_normed", grad_shifted, "grad_shifted", "condition", condition, stacked);
}

// `dense` and `mask` are what the problem points into.
inline ConditionShiftRmsNormProblem rms_norm_problem(const at::Tensor& dense, const at::Tensor& scale,
                                                     const at::Tensor& bias, const at::Tensor& weight, double eps,
                                                     const at::Tensor& mask) {
  const int64_t channels = dense.size(-1);
  return {channels ? dense.numel() / channels : 0,
          channels,
          dense_rows(dense),
          per_channel(scale),
          per_channel(bias),
          per_channel(weight),
          mask_bytes(mask),
          eps,
          dense.scalar_type() == at::kDouble};
}

}  // namespace apex_fast
