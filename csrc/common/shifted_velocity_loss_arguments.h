// Argument checks of shifted_velocity_loss, its backward and its one-pass variant, for every device.
#pragma once

#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/guidance.h"

namespace apex_fast {

inline void check_shifted_velocities(const char* op, const at::Tensor& v_shift, const at::Tensor& v_real,
                                     const at::Tensor& target, const std::optional<at::Tensor>& v_uncond,
                                     double guidance_scale, std::optional<double> clip) {
  check_batched(op, "v_shift", v_shift);
  check_sample(op, "v_real", v_real, "v_shift", v_shift);
  check_sample(op, "target", target, "v_shift", v_shift);
  check_state(op, "target", target, "v_shift", v_shift);
  check_guidance(op, v_uncond, guidance_scale, "v_shift", v_shift);
  TORCH_CHECK(!clip || *clip > 0, op, ": clip must be positive, got ", *clip, "; clip=None switches it off");
}

inline void check_generated_velocity(const char* op, const std::optional<at::Tensor>& v_gen,
                                     const at::Tensor& v_shift) {
  if (!v_gen) return;
  check_sample(op, "v_gen", *v_gen, "v_shift", v_shift);
  check_same_dtype(op, "v_gen", *v_gen, "v_shift", v_shift);
}

// The derivatives of a total by fake[b] and correction[b], as `fake_name` and `correction_name`.
inline void check_loss_derivatives(const char* op, const char* fake_name, const at::Tensor& fake,
                                   const char* correction_name, const at::Tensor& correction, const at::Tensor& v_shift,
                                   std::optional<at::ScalarType> grad_gen_dtype) {
  if (grad_gen_dtype) check_float_type(op, "grad_gen_dtype", *grad_gen_dtype);
  check_per_sample(op, fake_name, fake, "v_shift", v_shift);
  check_per_sample(op, correction_name, correction, "v_shift", v_shift);
}

constexpr double no_clip = std::numeric_limits<double>::infinity();

}  // namespace apex_fast
