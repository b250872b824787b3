// CUDA glue of condition_shift_rms_norm. The kernels are in condition_shift_rms_norm.cu.
#include <tuple>

#include "common/condition_shift_rms_norm_arguments.h"
#include "common/registration.h"
#include "cuda/kernels.h"
#include "cuda/row_glue.h"

namespace apex_fast::cuda {

std::tuple<at::Tensor, at::Tensor> condition_shift_rms_norm_cuda(const at::Tensor& condition, const at::Tensor& scale,
                                                                 const at::Tensor& bias, const at::Tensor& weight,
                                                                 double eps, const std::optional<at::Tensor>& mask,
                                                                 bool stacked, std::array<bool, 2> output_mask) {
  check_condition_shift_rms_norm(condition, scale, bias, weight, eps, mask, stacked, output_mask);
  const c10::cuda::CUDAGuard guard(condition.device());
  const Branches out(condition, stacked, output_mask);
  if (condition.numel() > 0 && out.any()) {
    const at::Tensor dense = condition.contiguous(), kept = dense_mask(mask);
    check_launch(condition_shift_rms_norm(rms_norm_problem(dense, scale, bias, weight, eps, kept), out.real(),
                                          out.shifted(), current_stream()));
  }
  return {out.first, out.second};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> condition_shift_rms_norm_backward_cuda(
    const std::optional<at::Tensor>& grad_normed, const std::optional<at::Tensor>& grad_shifted,
    const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias, const at::Tensor& weight, double eps,
    const std::optional<at::Tensor>& mask, bool stacked, std::array<bool, 4> output_mask) {
  check_condition_shift_rms_norm_backward(grad_normed, grad_shifted, condition, scale, bias, weight, eps, mask,
                                          stacked);
  const c10::cuda::CUDAGuard guard(condition.device());
  const BranchGradients grads(grad_normed, grad_shifted, stacked);
  const at::Tensor dense = condition.contiguous(), kept = dense_mask(mask);
  auto problem = rms_norm_problem(dense, scale, bias, weight, eps, kept);
  problem.wide = problem.wide || grads.wide();
  const bool empty = condition.numel() == 0;
  at::Tensor grad_condition =
      output_mask[0] ? at::empty(condition.sizes(), condition.options()) : nothing_like(condition);
  ParameterGradients<3> parameters(empty);
  if (!empty) {
    const RowTasks tasks = row_tasks(1, problem.rows, true);
    parameters.numbers = [=, channels = problem.channels](bool is_vector) {
      return row_partials(tasks, channels, is_vector);  // called when `tasks` is gone
    };
    parameters.partials_type = problem.wide ? at::kDouble : at::kFloat;
  }
  const at::Tensor* const of[3] = {&scale, &bias, &weight};
  for (int k = 0; k < 3; ++k)
    parameters.add(k, output_mask[k + 1], *of[k], of[k]->scalar_type());
  if (!empty && (output_mask[0] || parameters.any()))
    check_launch(condition_shift_rms_norm_backward(problem, grads.real(), grads.shifted(),
                                                   output_mask[0] ? dense_rows(grad_condition) : absent_rows,
                                                   parameters.gradients, current_stream()));
  return {grad_condition, parameters.tensors[0], parameters.tensors[1], parameters.tensors[2]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("condition_shift_rms_norm", &apex_fast::cuda::condition_shift_rms_norm_cuda);
  m.impl("condition_shift_rms_norm_backward", &apex_fast::cuda::condition_shift_rms_norm_backward_cuda);
}
