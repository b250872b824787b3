// CUDA glue of mixed_velocity_loss. The kernels are in mixed_velocity_loss.cu.
#include <tuple>

#include "common/mixed_velocity_loss_arguments.h"
#include "common/registration.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

at::Tensor mixed_velocity_loss_cuda(const at::Tensor& velocity, const at::Tensor& x, const at::Tensor& z,
                                    const std::optional<at::Tensor>& v_fake, double mix_weight) {
  check_mixed_velocity_loss("mixed_velocity_loss", velocity, x, z, v_fake, mix_weight);
  const c10::cuda::CUDAGuard guard(velocity.device());
  const auto type = compute_type(velocity, x, v_fake);
  at::Tensor loss = at::empty({velocity.size(0)}, velocity.options().dtype(type));
  if (velocity.numel() == 0) return loss.zero_();
  SampleLayout layout(velocity);
  const Operand primary = layout.operand(velocity);
  at::Tensor partials = workspace(partial_sums(layout.geometry(), primary, 1), velocity);
  check_launch(mixed_velocity_loss(layout.geometry(), primary, layout.operand(x), layout.operand(z),
                                   layout.operand(v_fake), mix_weight, partials.mutable_data_ptr<double>(),
                                   loss.mutable_data_ptr(), dtype_of(type), type == at::kDouble, current_stream()));
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_velocity_loss_backward_cuda(
    const at::Tensor& grad, const at::Tensor& velocity, const at::Tensor& x, const at::Tensor& z,
    const std::optional<at::Tensor>& v_fake, double mix_weight, std::array<bool, 3> output_mask) {
  constexpr auto op = "mixed_velocity_loss_backward";
  check_mixed_velocity_loss(op, velocity, x, z, v_fake, mix_weight);
  check_per_sample(op, "grad", grad, "velocity", velocity);
  const c10::cuda::CUDAGuard guard(velocity.device());
  SampleLayout layout(velocity);
  const Gradients<3> gradients(layout, velocity, {velocity.scalar_type(), x.scalar_type(), z.scalar_type()},
                               output_mask);
  if (velocity.numel() > 0 && gradients.any)
    check_launch(mixed_velocity_loss_backward(layout.geometry(), layout.operand(velocity), layout.operand(x),
                                              layout.operand(z), layout.operand(v_fake), mix_weight, times_of(grad),
                                              gradients.operands, compute_type(velocity, x, v_fake) == at::kDouble,
                                              current_stream()));
  return {gradients.tensors[0], gradients.tensors[1], gradients.tensors[2]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("mixed_velocity_loss", &apex_fast::cuda::mixed_velocity_loss_cuda);
  m.impl("mixed_velocity_loss_backward", &apex_fast::cuda::mixed_velocity_loss_backward_cuda);
}
