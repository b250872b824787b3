// Argument checks of condition_shift and condition_shift_backward, for every device.
#pragma once

#include <optional>

#include "common/checks.h"

namespace apex_fast {

constexpr int max_condition_dims = 9;  // with the channels

inline void check_condition_parameter(const char* op, const char* name, const at::Tensor& parameter,
                                      const at::Tensor& condition) {
  check_float(op, name, parameter);
  TORCH_CHECK(parameter.dim() == 0 || (parameter.dim() == 1 && parameter.size(0) == condition.size(-1)), op, ": ", name,
              " must be [] or [D] with D = ", condition.size(-1), ", the last dimension of condition, got ",
              parameter.sizes());
  TORCH_CHECK(parameter.device() == condition.device(), op, ": ", name, " must be on the device of condition, got ",
              parameter.device(), " and ", condition.device());
}

inline void check_condition_shift(const char* op, const at::Tensor& condition, const at::Tensor& scale,
                                  const at::Tensor& bias, const std::optional<at::Tensor>& mask) {
  check_float(op, "condition", condition);
  TORCH_CHECK(condition.dim() >= 1 && condition.dim() <= max_condition_dims, op,
              ": condition must be [..., D] with 1 to ", max_condition_dims, " dimensions, got ", condition.sizes());
  check_condition_parameter(op, "scale", scale, condition);
  check_condition_parameter(op, "bias", bias, condition);
  if (!mask) return;
  TORCH_CHECK(mask->sizes() == condition.sizes().slice(0, condition.dim() - 1), op,
              ": mask must have the shape of condition without D, ", condition.sizes().slice(0, condition.dim() - 1),
              ", got ", mask->sizes());
  TORCH_CHECK(mask->device() == condition.device(), op, ": mask must be on the device of condition, got ",
              mask->device(), " and ", condition.device());
}

// One byte per token, nonzero = shift it, where the condition has D numbers: the one copy this op may make.
inline at::Tensor mask_bytes(const at::Tensor& mask) {
  return (mask.scalar_type() == at::kBool ? mask : mask.ne(0)).contiguous();
}

}  // namespace apex_fast
