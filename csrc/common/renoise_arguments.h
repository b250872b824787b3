// Argument checks of renoise and renoise_backward, for every device.
#pragma once

#include "common/checks.h"

namespace apex_fast {

inline void check_renoise(const at::Tensor& velocity, const at::Tensor& x_s, const at::Tensor& s, const at::Tensor& z,
                          const at::Tensor& t) {
  constexpr auto op = "renoise";
  check_batched(op, "x_s", x_s);
  check_sample(op, "velocity", velocity, "x_s", x_s);
  check_sample(op, "z", z, "x_s", x_s);
  check_same_dtype(op, "z", z, "x_s", x_s);
  check_state(op, "x_s", x_s, "velocity", velocity);
  check_per_sample(op, "s", s, "x_s", x_s);
  check_per_sample(op, "t", t, "x_s", x_s);
}

inline void check_renoise_backward(const at::Tensor& grad_x_fake_t, const at::Tensor& grad_target, const at::Tensor& s,
                                   const at::Tensor& t, at::ScalarType velocity_dtype) {
  constexpr auto op = "renoise_backward";
  check_float_type(op, "velocity_dtype", velocity_dtype);
  check_batched(op, "grad_x_fake_t", grad_x_fake_t);
  check_sample(op, "grad_target", grad_target, "grad_x_fake_t", grad_x_fake_t);
  check_per_sample(op, "s", s, "grad_x_fake_t", grad_x_fake_t);
  check_per_sample(op, "t", t, "grad_x_fake_t", grad_x_fake_t);
}

}  // namespace apex_fast
