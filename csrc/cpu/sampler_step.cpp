#include "math/sampler_step.h"

#include "common/layout.h"
#include "common/registration.h"
#include "common/sampler_step_arguments.h"
#include "cpu/kernels.h"
#include "cpu/scaled_copies.h"

namespace apex_fast::cpu {

at::Tensor sampler_step_cpu(const at::Tensor& x, const at::Tensor& velocity, const at::Tensor& t,
                            const at::Tensor& t_next, const std::optional<at::Tensor>& noise,
                            const std::optional<at::Tensor>& v_uncond, double guidance_scale, double stochasticity) {
  check_sampler_step(x, velocity, t, t_next, noise, v_uncond, guidance_scale, stochasticity);
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
  check_sampler_step_backward(grad, t, t_next, stochasticity, velocity_dtype, uncond_dtype, noise_dtype);
  const Times times = times_of(t), next = times_of(t_next);
  const double conditional = guided ? guidance_scale : 1.0;
  const std::array<at::ScalarType, 4> types{grad.scalar_type(), velocity_dtype, uncond_dtype.value_or(velocity_dtype),
                                            noise_dtype.value_or(grad.scalar_type())};
  const auto renewal = math::noise_renewal(stochasticity);
  const auto gradients = scaled_copies<4>(grad, types, output_mask, [&](int64_t b) {
    const auto k = math::step_coefficients(time_at(times, b), time_at(next, b), renewal);
    return std::array<double, 4>{k.x, k.velocity * conditional, k.velocity * (1.0 - conditional), k.noise};
  });
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("sampler_step", &apex_fast::cpu::sampler_step_cpu);
  m.impl("sampler_step_backward", &apex_fast::cpu::sampler_step_backward_cpu);
}
