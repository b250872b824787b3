// CUDA glue of interpolate: checks, layout, device and stream. The kernels are in interpolate.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "common/checks.h"
#include "common/layout.h"
#include "common/registration.h"
#include "cuda/kernels.h"

namespace apex_fast {

namespace {

// Asynchronous errors of earlier work surface here too; what this reports for certain is a launch that was refused.
void check_launch(int error) {
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

at::Tensor interpolate_cuda(const at::Tensor& x, const at::Tensor& z, const at::Tensor& t) {
  check_batched("interpolate", "x", x);
  check_sample("interpolate", "z", z, "x", x);
  check_same_dtype("interpolate", "z", z, "x", x);
  check_per_sample("interpolate", "t", t, "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  SampleLayout layout(x);
  at::Tensor x_t = layout.make(x.scalar_type());
  if (x.numel() == 0) return x_t;
  check_launch(cuda::interpolate(layout.geometry(), layout.operand(x), layout.operand(z), times_of(t),
                                 layout.output(x_t), c10::cuda::getCurrentCUDAStream().stream()));
  return x_t;
}

std::tuple<at::Tensor, at::Tensor> interpolate_backward_cuda(const at::Tensor& grad, const at::Tensor& t,
                                                             std::array<bool, 2> output_mask) {
  check_batched("interpolate_backward", "grad", grad);
  check_per_sample("interpolate_backward", "t", t, "grad", grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  SampleLayout layout(grad);
  const auto make = [&](bool wanted) {
    return wanted ? layout.make(grad.scalar_type()) : at::empty({0}, grad.options());
  };
  at::Tensor grad_x = make(output_mask[0]);
  at::Tensor grad_z = make(output_mask[1]);
  if (grad.numel() == 0 || !(output_mask[0] || output_mask[1])) return {grad_x, grad_z};
  check_launch(cuda::interpolate_backward(layout.geometry(), layout.operand(grad), times_of(t),
                                          output_mask[0] ? layout.output(grad_x) : SampleLayout::absent,
                                          output_mask[1] ? layout.output(grad_z) : SampleLayout::absent,
                                          c10::cuda::getCurrentCUDAStream().stream()));
  return {grad_x, grad_z};
}

}  // namespace

}  // namespace apex_fast

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("interpolate", &apex_fast::interpolate_cuda);
  m.impl("interpolate_backward", &apex_fast::interpolate_backward_cuda);
}
