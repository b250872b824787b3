// CUDA glue of sampler_step. The kernels are in sampler_step.cu.
#include <tuple>

#include "common/registration.h"
#include "common/sampler_step_arguments.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

at::Tensor sampler_step_cuda(const at::Tensor& x, const at::Tensor& velocity, const at::Tensor& t,
                             const at::Tensor& t_next, const std::optional<at::Tensor>& noise,
                             const std::optional<at::Tensor>& v_uncond, double guidance_scale, double stochasticity) {
  check_sampler_step(x, velocity, t, t_next, noise, v_uncond, guidance_scale, stochasticity);
  const c10::cuda::CUDAGuard guard(x.device());
  SampleLayout layout(x);
  at::Tensor out = layout.make(x.scalar_type());
  if (x.numel() == 0) return out;
  check_launch(sampler_step(layout.geometry(), layout.operand(x), layout.operand(velocity), layout.operand(v_uncond),
                            layout.operand(noise), times_of(t), times_of(t_next), guidance_scale, stochasticity,
                            layout.output(out), compute_type(x, velocity, v_uncond, noise) == at::kDouble,
                            current_stream()));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sampler_step_backward_cuda(
    const at::Tensor& grad, const at::Tensor& t, const at::Tensor& t_next, double guidance_scale, double stochasticity,
    bool guided, at::ScalarType velocity_dtype, std::optional<at::ScalarType> uncond_dtype,
    std::optional<at::ScalarType> noise_dtype, std::array<bool, 4> output_mask) {
  check_sampler_step_backward(grad, t, t_next, stochasticity, velocity_dtype, uncond_dtype, noise_dtype);
  const c10::cuda::CUDAGuard guard(grad.device());
  SampleLayout layout(grad);
  std::array<at::ScalarType, 4> types{grad.scalar_type(), velocity_dtype, uncond_dtype.value_or(velocity_dtype),
                                      noise_dtype.value_or(grad.scalar_type())};
  for (size_t k = 0; k < 4; ++k)  // what is not wanted comes back in the dtype of grad
    if (!output_mask[k]) types[k] = grad.scalar_type();
  const Gradients<4> gradients(layout, grad, types, output_mask);
  if (grad.numel() > 0 && gradients.any)
    check_launch(sampler_step_backward(layout.geometry(), layout.operand(grad), times_of(t), times_of(t_next),
                                       guidance_scale, stochasticity, guided, gradients.operands,
                                       gradients.wide || compute_type(grad) == at::kDouble, current_stream()));
  const auto& g = gradients.tensors;
  return {g[0], g[1], g[2], g[3]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("sampler_step", &apex_fast::cuda::sampler_step_cuda);
  m.impl("sampler_step_backward", &apex_fast::cuda::sampler_step_backward_cuda);
}
