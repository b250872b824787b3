// CUDA glue of renoise. The kernels are in renoise.cu.
#include <tuple>

#include "common/registration.h"
#include "common/renoise_arguments.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

std::tuple<at::Tensor, at::Tensor> renoise_cuda(const at::Tensor& velocity, const at::Tensor& x_s, const at::Tensor& s,
                                                const at::Tensor& z, const at::Tensor& t) {
  check_renoise(velocity, x_s, s, z, t);
  const c10::cuda::CUDAGuard guard(x_s.device());
  SampleLayout layout(x_s);
  at::Tensor x_fake_t = layout.make(x_s.scalar_type()), target = layout.make(x_s.scalar_type());
  if (x_s.numel() == 0) return {x_fake_t, target};
  check_launch(renoise(layout.geometry(), layout.operand(velocity), layout.operand(x_s), layout.operand(z), times_of(s),
                       times_of(t), layout.output(x_fake_t), layout.output(target),
                       compute_type(velocity, x_s) == at::kDouble, current_stream()));
  return {x_fake_t, target};
}

at::Tensor renoise_backward_cuda(const at::Tensor& grad_x_fake_t, const at::Tensor& grad_target, const at::Tensor& s,
                                 const at::Tensor& t, at::ScalarType velocity_dtype) {
  check_renoise_backward(grad_x_fake_t, grad_target, s, t, velocity_dtype);
  const c10::cuda::CUDAGuard guard(grad_x_fake_t.device());
  SampleLayout layout(grad_x_fake_t);
  at::Tensor grad_velocity = layout.make(velocity_dtype);
  if (grad_velocity.numel() == 0) return grad_velocity;
  check_launch(renoise_backward(layout.geometry(), layout.operand(grad_x_fake_t), layout.operand(grad_target),
                                times_of(s), times_of(t), layout.output(grad_velocity),
                                compute_type(grad_x_fake_t, grad_target, grad_velocity) == at::kDouble,
                                current_stream()));
  return grad_velocity;
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("renoise", &apex_fast::cuda::renoise_cuda);
  m.impl("renoise_backward", &apex_fast::cuda::renoise_backward_cuda);
}
