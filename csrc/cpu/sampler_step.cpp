#include "math/sampler_step.h"

#include "common/checks.h"
#include "common/guidance.h"
#include "common/layout.h"
#include "common/registration.h"
#include "cpu/kernels.h"
#include "cpu/scaled_copies.h"

namespace apex_fast::cpu {

namespace {

void check_stochasticity(const char* op, double stochasticity) {
  TORCH_CHECK(stochasticity >= 0.0 && stochasticity <= 1.0, op,
              ": stochasticity must lie in [0, 1] (0 is Euler, 1 is re-noise), got ", stochasticity);
}

}  // namespace

at::Tensor sampler_step_cpu(const at::Tensor& x, const at::Tensor& velocity, const at::Tensor& t,
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
  SampleLayout layout(x);
  at::Tensor out = layout.make(x.scalar_type());
  if (x.numel() == 0) return out;
  table().sampler_step(layout.geometry(), layout.operand(x), layout.operand(velocity), layout.operand(v_uncond),
                       layout.operand(noise), times_of(t), times_of(t_next), guidance_scale, stochasticity,
                       layout.output(out), compute_type(x, velocity, v_uncond, noise) == at::kDouble);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampler_step_backward_cpu(
    const at::Tensor& grad, const at::Tensor& t, const at::Tensor& t_next, double guidance_scale, double stochasticity,
    bool guided, at::ScalarType velocity_dtype, std::optional<at::ScalarType> uncond_dtype,
    std::optional<at::ScalarType> noise_dtype, std::array<bool, 4> output_mask) {
  constexpr auto op = "sampler_step_backward";
  check_batched(op, "grad", grad);
  check_per_sample(op, "t", t, "grad", grad);
  check_per_sample(op, "t_next", t_next, "grad", grad);
  check_stochasticity(op, stochasticity);
  check_float_type(op, "velocity_dtype", velocity_dtype);
  if (uncond_dtype) check_float_type(op, "uncond_dtype", *uncond_dtype);
  if (noise_dtype) check_float_type(op, "noise_dtype", *noise_dtype);
  const Times times = times_of(t), next = times_of(t_next);
  const double conditional = guided ? guidance_scale : 1.0;
  const std::array<at::ScalarType, 4> types{grad.scalar_type(), velocity_dtype, uncond_dtype.value_or(velocity_dtype),
                                            noise_dtype.value_or(grad.scalar_type())};
  const auto gradients = scaled_copies<4>(grad, types, output_mask, [&](int64_t b) {
    const auto k = math::step_coefficients(time_at(times, b), time_at(next, b), stochasticity);
    return std::array<double, 4>{k.x, k.velocity * conditional, k.velocity * (1.0 - conditional), k.noise};
  });
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("sampler_step", &apex_fast::cpu::sampler_step_cpu);
  m.impl("sampler_step_backward", &apex_fast::cpu::sampler_step_backward_cpu);
}
