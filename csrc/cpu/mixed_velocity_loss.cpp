#include <ATen/ops/empty.h>

#include "common/layout.h"
#include "common/mixed_velocity_loss_arguments.h"
#include "common/registration.h"
#include "cpu/kernels.h"
#include "cpu/partial_sums.h"

namespace apex_fast::cpu {

at::Tensor mixed_velocity_loss_cpu(const at::Tensor& velocity, const at::Tensor& x, const at::Tensor& z,
                                   const std::optional<at::Tensor>& v_fake, double mix_weight) {
  check_mixed_velocity_loss("mixed_velocity_loss", velocity, x, z, v_fake, mix_weight);
  const auto type = compute_type(velocity, x, v_fake);
  at::Tensor loss = at::empty({velocity.size(0)}, velocity.options().dtype(type));
  if (velocity.numel() == 0) return loss.zero_();
  SampleLayout layout(velocity);
  const Geometry& g = layout.geometry();
  PartialSums sums(g, 1);
  table().mixed_velocity_loss(g, layout.operand(velocity), layout.operand(x), layout.operand(z), layout.operand(v_fake),
                              mix_weight, sums.values.data(), type == at::kDouble);
  const double scale = 1.0 / static_cast<double>(g.sample_size());
  for (int64_t b = 0; b < g.batch; ++b) {
    if (type == at::kDouble)
      loss.mutable_data_ptr<double>()[b] = sums.total(b, 0) * scale;
    else
      loss.mutable_data_ptr<float>()[b] = static_cast<float>(sums.total(b, 0) * scale);
  }
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mixed_velocity_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& velocity, const at::Tensor& x, const at::Tensor& z,
    const std::optional<at::Tensor>& v_fake, double mix_weight, std::array<bool, 3> output_mask) {
  constexpr auto op = "mixed_velocity_loss_backward";
  check_mixed_velocity_loss(op, velocity, x, z, v_fake, mix_weight);
  check_per_sample(op, "grad", grad, "velocity", velocity);
  SampleLayout layout(velocity);
  const at::ScalarType types[3] = {velocity.scalar_type(), x.scalar_type(), z.scalar_type()};
  at::Tensor gradients[3];
  Operand outputs[3] = {SampleLayout::absent, SampleLayout::absent, SampleLayout::absent};
  for (int k = 0; k < 3; ++k) {
    gradients[k] = output_mask[k] ? layout.make(types[k]) : at::empty({0}, velocity.options().dtype(types[k]));
    if (output_mask[k]) outputs[k] = layout.output(gradients[k]);
  }
  if (velocity.numel() > 0 && (output_mask[0] || output_mask[1] || output_mask[2])) {
    const auto weight = per_sample(grad, 2.0 / static_cast<double>(layout.geometry().sample_size()));
    table().mixed_velocity_loss_backward(layout.geometry(), layout.operand(velocity), layout.operand(x),
                                         layout.operand(z), layout.operand(v_fake), mix_weight, weight.data(),
                                         outputs[0], outputs[1], outputs[2],
                                         compute_type(velocity, x, v_fake) == at::kDouble);
  }
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("mixed_velocity_loss", &apex_fast::cpu::mixed_velocity_loss_cpu);
  m.impl("mixed_velocity_loss_backward", &apex_fast::cpu::mixed_velocity_loss_backward_cpu);
}
