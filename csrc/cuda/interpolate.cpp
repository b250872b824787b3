// CUDA glue of interpolate: checks, layout, device and stream. The kernels are in interpolate.cu.
#include <tuple>

#include "common/interpolate_arguments.h"
#include "common/registration.h"
#include "cuda/glue.h"
#include "cuda/kernels.h"

namespace apex_fast::cuda {

at::Tensor interpolate_cuda(const at::Tensor& x, const at::Tensor& z, const at::Tensor& t) {
  check_interpolate(x, z, t);
  const c10::cuda::CUDAGuard guard(x.device());
  SampleLayout layout(x);
  at::Tensor x_t = layout.make(x.scalar_type());
  if (x.numel() == 0) return x_t;
  check_launch(interpolate(layout.geometry(), layout.operand(x), layout.operand(z), times_of(t), layout.output(x_t),
                           compute_type(x, z) == at::kDouble, current_stream()));
  return x_t;
}

std::tuple<at::Tensor, at::Tensor> interpolate_backward_cuda(const at::Tensor& grad, const at::Tensor& t,
                                                             std::array<bool, 2> output_mask) {
  check_interpolate_backward(grad, t);
  const c10::cuda::CUDAGuard guard(grad.device());
  SampleLayout layout(grad);
  const Gradients<2> gradients(layout, grad, {grad.scalar_type(), grad.scalar_type()}, output_mask);
  if (grad.numel() > 0 && gradients.any)
    check_launch(interpolate_backward(layout.geometry(), layout.operand(grad), times_of(t), gradients.operands[0],
                                      gradients.operands[1], compute_type(grad) == at::kDouble, current_stream()));
  return {gradients.tensors[0], gradients.tensors[1]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("interpolate", &apex_fast::cuda::interpolate_cuda);
  m.impl("interpolate_backward", &apex_fast::cuda::interpolate_backward_cuda);
}
