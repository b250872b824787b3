// Argument checks of sampler_step and sampler_step_backward, for every device.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/guidance.h"

namespace apex_fast {

inline void check_stochasticity(const char* op, double stochasticity) {
  TORCH_CHECK(stochasticity >= 0.0 && stochasticity <= 1.0, op,
              ": stochasticity must lie in [0, 1] (0 is Euler, 1 is re-noise), got ", stochasticity);
}

inline void check_sampler_step(const at::Tensor& x, const at::Tensor& velocity, const at::Tensor& t,
                               const at::Tensor& t_next, const std::optional<at::Tensor>& noise,
                               const std::optional<at::Tensor>& v_uncond, double guidance_scale, double stochasticity) {
  constexpr auto op = "sampler_step";
  check_batched(op, "x", x);
  check_sample(op, "velocity", velocity, "x", x);
  check_state(op, "x", x, "velocity", velocity);
  check_per_sample(op, "t", t, "x", x);
  check_per_sample(op, "t_next", t_next, "x", x);
  check_guidance(op, v_uncond, guidance_scale, "x", x);
  check_stochasticity(op, stochasticity);
  TORCH_CHECK(noise || stochasticity == 0.0, op, ": stochasticity ", stochasticity,
              " needs noise; pass it, or leave stochasticity at 0");
  if (noise) {
    check_sample(op, "noise", *noise, "x", x);
    check_state(op, "noise", *noise, "velocity", velocity);
  }
}

inline void check_sampler_step_backward(const at::Tensor& grad, const at::Tensor& t, const at::Tensor& t_next,
                                        double stochasticity, at::ScalarType velocity_dtype,
                                        std::optional<at::ScalarType> uncond_dtype,
                                        std::optional<at::ScalarType> noise_dtype) {
  constexpr auto op = "sampler_step_backward";
  check_batched(op, "grad", grad);
  check_per_sample(op, "t", t, "grad", grad);
  check_per_sample(op, "t_next", t_next, "grad", grad);
  check_stochasticity(op, stochasticity);
  check_float_type(op, "velocity_dtype", velocity_dtype);
  if (uncond_dtype) check_float_type(op, "uncond_dtype", *uncond_dtype);
  if (noise_dtype) check_float_type(op, "noise_dtype", *noise_dtype);
}

}  // namespace apex_fast
