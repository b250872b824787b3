#include "common/layout.h"
#include "common/registration.h"
#include "common/renoise_arguments.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

std::tuple<at::Tensor, at::Tensor> renoise_cpu(const at::Tensor& velocity, const at::Tensor& x_s, const at::Tensor& s,
                                               const at::Tensor& z, const at::Tensor& t) {
  check_renoise(velocity, x_s, s, z, t);
  SampleLayout layout(x_s);
  at::Tensor x_fake_t = layout.make(x_s.scalar_type()), target = layout.make(x_s.scalar_type());
  if (x_s.numel() == 0) return {x_fake_t, target};
  table().renoise(layout.geometry(), layout.operand(velocity), layout.operand(x_s), layout.operand(z), times_of(s),
                  times_of(t), layout.output(x_fake_t), layout.output(target),
                  compute_type(velocity, x_s) == at::kDouble);
  return {x_fake_t, target};
}

at::Tensor renoise_backward_cpu(const at::Tensor& grad_x_fake_t, const at::Tensor& grad_target, const at::Tensor& s,
                                const at::Tensor& t, at::ScalarType velocity_dtype) {
  check_renoise_backward(grad_x_fake_t, grad_target, s, t, velocity_dtype);
  SampleLayout layout(grad_x_fake_t);
  at::Tensor grad_velocity = layout.make(velocity_dtype);
  if (grad_velocity.numel() == 0) return grad_velocity;
  table().renoise_backward(layout.geometry(), layout.operand(grad_x_fake_t), layout.operand(grad_target), times_of(s),
                           times_of(t), layout.output(grad_velocity),
                           compute_type(grad_x_fake_t, grad_target, grad_velocity) == at::kDouble);
  return grad_velocity;
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("renoise", &apex_fast::cpu::renoise_cpu);
  m.impl("renoise_backward", &apex_fast::cpu::renoise_backward_cpu);
}
