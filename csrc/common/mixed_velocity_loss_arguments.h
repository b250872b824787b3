// Argument checks of mixed_velocity_loss and mixed_velocity_loss_backward, for every device.
#pragma once

#include <optional>

#include "common/checks.h"

namespace apex_fast {

inline void check_mixed_velocity_loss(const char* op, const at::Tensor& velocity, const at::Tensor& x,
                                      const at::Tensor& z, const std::optional<at::Tensor>& v_fake, double mix_weight) {
  check_batched(op, "velocity", velocity);
  check_sample(op, "x", x, "velocity", velocity);
  check_sample(op, "z", z, "velocity", velocity);
  check_same_dtype(op, "z", z, "x", x);
  check_state(op, "x", x, "velocity", velocity);
  if (v_fake) check_sample(op, "v_fake", *v_fake, "velocity", velocity);
  TORCH_CHECK(v_fake || mix_weight == 0.0, op, ": mix_weight ", mix_weight,
              " needs v_fake, the velocity under the shifted condition; pass it, or leave mix_weight at 0");
}

}  // namespace apex_fast
