// Argument checks of projected_condition_shift and its backward, for every device, and what their kernels are told.
#pragma once

#include <array>
#include <optional>

#include "common/row_problems.h"
#include "common/rows.h"

namespace apex_fast {

inline void check_one_number(const char* op, const char* name, const at::Tensor& value, const at::Tensor& row_sums) {
  check_float(op, name, value);
  TORCH_CHECK(value.dim() == 0, op, ": ", name, " must be one number, [], got ", value.sizes(),
              "; one number per channel does not pass through the linear layer: shift its input with condition_shift");
  check_device(op, name, value, "row_sums", row_sums);
}

inline void check_projection_parameters(const char* op, const at::Tensor& scale, const at::Tensor& bias,
                                        const at::Tensor& row_sums, const char* rows_name, const at::Tensor& rows) {
  check_channels(op, "row_sums", row_sums, rows_name, rows);
  check_one_number(op, "scale", scale, row_sums);
  check_one_number(op, "bias", bias, row_sums);
}

inline void check_projected_condition_shift(const at::Tensor& projected, const at::Tensor& scale,
                                            const at::Tensor& bias, const at::Tensor& row_sums,
                                            const std::optional<at::Tensor>& linear_bias,
                                            const std::optional<at::Tensor>& mask, bool stacked,
                                            std::array<bool, 2> output_mask) {
  constexpr auto op = "projected_condition_shift";
  check_rows(op, "projected", projected);
  check_projection_parameters(op, scale, bias, row_sums, "projected", projected);
  if (linear_bias) check_channels(op, "linear_bias", *linear_bias, "projected", projected);
  check_mask(op, mask, "projected", projected);
  check_branches(op, "projected", projected, stacked, output_mask);
}

// Returns a tensor with shape and dtype of the projection: a gradient, or half of the one that holds both.
inline at::Tensor check_projected_condition_shift_backward(
    const std::optional<at::Tensor>& grad_real, const std::optional<at::Tensor>& grad_shifted,
    const std::optional<at::Tensor>& projected, const at::Tensor& scale, const at::Tensor& bias,
    const at::Tensor& row_sums, const std::optional<at::Tensor>& mask, bool stacked, at::ScalarType linear_bias_dtype,
    std::array<bool, 5> output_mask) {
  constexpr auto op = "projected_condition_shift_backward";
  TORCH_CHECK(grad_real || grad_shifted, op, ": grad_real or grad_shifted must be given");
  check_float_type(op, "linear_bias_dtype", linear_bias_dtype);
  const at::Tensor& grad = grad_real ? *grad_real : *grad_shifted;
  check_rows(op, grad_real ? "grad_real" : "grad_shifted", grad);
  check_branches(op, "grad_real", grad, stacked, {true, true});
  TORCH_CHECK(!stacked || (grad_real && grad.size(0) % 2 == 0), op,
              ": stacked needs grad_real with both branches, an even batch, got ", grad.sizes());
  const at::Tensor like = stacked ? grad.narrow(0, 0, grad.size(0) / 2) : grad;
  check_branch_gradients(op, grad_real, "grad_real", grad_shifted, "grad_shifted", "projected",
                         projected ? *projected : like, stacked);
  check_projection_parameters(op, scale, bias, row_sums, "grad_real", like);
  check_mask(op, mask, "projected", like);
  TORCH_CHECK(projected || !output_mask[1], op, ": the gradient of scale needs projected");
  return like;
}

// The problem without its rows and its linear bias. `mask` is what it points into.
inline ProjectedConditionShiftProblem projection_problem(const at::Tensor& rows, const at::Tensor& scale,
                                                         const at::Tensor& bias, const at::Tensor& row_sums,
                                                         const at::Tensor& mask) {
  const int64_t channels = row_sums.size(0);
  return {channels ? rows.numel() / channels : 0,
          channels,
          absent_rows,
          per_channel(row_sums),
          absent_rows,
          per_channel(scale),
          per_channel(bias),
          mask_bytes(mask),
          rows.scalar_type() == at::kDouble};
}

}  // namespace apex_fast
