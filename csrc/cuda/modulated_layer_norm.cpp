// CUDA glue of modulated_layer_norm. The kernels are in modulated_layer_norm.cu.
#include <tuple>

#include "common/modulated_layer_norm_arguments.h"
#include "common/registration.h"
#include "cuda/kernels.h"
#include "cuda/row_glue.h"

namespace apex_fast::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_cuda(const at::Tensor& hidden,
                                                                         const at::Tensor& scale,
                                                                         const at::Tensor& shift, double eps) {
  check_modulated_layer_norm(hidden, scale, shift, eps);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const auto rows = hidden.sizes().slice(0, hidden.dim() - 1);
  const auto statistics = hidden.options().dtype(row_statistics_type(hidden));
  at::Tensor out = at::empty(hidden.sizes(), hidden.options()), mean = at::empty(rows, statistics),
             rstd = at::empty(rows, statistics);
  if (hidden.numel() == 0) return {out, mean.zero_(), rstd.zero_()};
  const at::Tensor dense = hidden.contiguous();
  check_launch(modulated_layer_norm(layer_norm_problem(dense, scale, shift, eps), dense_rows(out),
                                    mean.mutable_data_ptr(), rstd.mutable_data_ptr(), current_stream()));
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_backward_cuda(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& scale, const at::Tensor& mean,
    const at::Tensor& rstd, at::ScalarType shift_dtype, std::array<bool, 3> output_mask) {
  check_modulated_layer_norm_backward(grad, hidden, scale, mean, rstd, shift_dtype);
  const c10::cuda::CUDAGuard guard(hidden.device());
  const at::Tensor dense = hidden.contiguous(), upstream = grad.contiguous(), center = mean.contiguous(),
                   inverse = rstd.contiguous();
  auto problem = layer_norm_problem(dense, scale, scale, 0);
  problem.wide = problem.wide || grad.scalar_type() == at::kDouble;
  const bool empty = hidden.numel() == 0;
  at::Tensor grad_hidden = output_mask[0] ? at::empty(hidden.sizes(), hidden.options()) : nothing_like(hidden);
  ParameterGradients<2> parameters(empty);
  if (!empty) {
    const RowTasks tasks = row_tasks(problem.batch, problem.rows_per_sample, true);
    parameters.numbers = [=, channels = problem.channels](bool is_vector) {
      return row_partials(tasks, channels, is_vector);  // called when `tasks` is gone
    };
    parameters.partials_type = problem.wide ? at::kDouble : at::kFloat;
  }
  parameters.add(0, output_mask[1], scale, scale.scalar_type());
  parameters.add(1, output_mask[2], scale, shift_dtype);
  if (!empty && (output_mask[0] || parameters.any()))
    check_launch(modulated_layer_norm_backward(problem, dense_rows(upstream), center.const_data_ptr(),
                                               inverse.const_data_ptr(), dtype_of(center.scalar_type()),
                                               output_mask[0] ? dense_rows(grad_hidden) : absent_rows,
                                               parameters.gradients, current_stream()));
  return {grad_hidden, parameters.tensors[0], parameters.tensors[1]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("modulated_layer_norm", &apex_fast::cuda::modulated_layer_norm_cuda);
  m.impl("modulated_layer_norm_backward", &apex_fast::cuda::modulated_layer_norm_backward_cuda);
}
