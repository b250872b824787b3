#include "common/interpolate_arguments.h"
#include "common/layout.h"
#include "common/registration.h"
#include "cpu/kernels.h"
#include "cpu/scaled_copies.h"

namespace apex_fast::cpu {

at::Tensor interpolate_cpu(const at::Tensor& x, const at::Tensor& z, const at::Tensor& t) {
  check_interpolate(x, z, t);
  SampleLayout layout(x);
  at::Tensor x_t = layout.make(x.scalar_type());
  if (x.numel() == 0) return x_t;
  table().interpolate(layout.geometry(), layout.operand(x), layout.operand(z), times_of(t), layout.output(x_t),
                      compute_type(x, z) == at::kDouble);
  return x_t;
}

std::tuple<at::Tensor, at::Tensor> interpolate_backward_cpu(const at::Tensor& grad, const at::Tensor& t,
                                                            std::array<bool, 2> output_mask) {
  check_interpolate_backward(grad, t);
  const Times times = times_of(t);
  const auto gradients = scaled_copies<2>(grad, {grad.scalar_type(), grad.scalar_type()}, output_mask, [&](int64_t b) {
    const double time = time_at(times, b);
    return std::array<double, 2>{1.0 - time, time};
  });
  return {gradients[0], gradients[1]};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("interpolate", &apex_fast::cpu::interpolate_cpu);
  m.impl("interpolate_backward", &apex_fast::cpu::interpolate_backward_cpu);
}
