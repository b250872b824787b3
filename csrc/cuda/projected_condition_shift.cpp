// CUDA glue of projected_condition_shift. The kernels are in projected_condition_shift.cu.
#include <tuple>

#include "common/projected_condition_shift_arguments.h"
#include "common/registration.h"
#include "cuda/kernels.h"
#include "cuda/row_glue.h"

namespace apex_fast::cuda {

std::tuple<at::Tensor, at::Tensor> projected_condition_shift_cuda(const at::Tensor& projected, const at::Tensor& scale,
                                                                  const at::Tensor& bias, const at::Tensor& row_sums,
                                                                  const std::optional<at::Tensor>& linear_bias,
                                                                  const std::optional<at::Tensor>& mask, bool stacked,
                                                                  std::array<bool, 2> output_mask) {
  check_projected_condition_shift(projected, scale, bias, row_sums, linear_bias, mask, stacked, output_mask);
  const c10::cuda::CUDAGuard guard(projected.device());
  const Branches out(projected, stacked, output_mask);
  if (projected.numel() > 0 && out.any()) {
    const at::Tensor dense = projected.contiguous(), kept = dense_mask(mask);
    auto problem = projection_problem(dense, scale, bias, row_sums, kept);
    problem.projected = dense_rows(dense);
    problem.linear_bias = linear_bias ? per_channel(*linear_bias) : absent_rows;
    check_launch(projected_condition_shift(problem, out.real(), out.shifted(), current_stream()));
  }
  return {out.first, out.second};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> projected_condition_shift_backward_cuda(
    const std::optional<at::Tensor>& grad_real, const std::optional<at::Tensor>& grad_shifted,
    const std::optional<at::Tensor>& projected, const at::Tensor& scale, const at::Tensor& bias,
    const at::Tensor& row_sums, const std::optional<at::Tensor>& mask, bool stacked, at::ScalarType linear_bias_dtype,
    std::array<bool, 5> output_mask) {
  const at::Tensor like = check_projected_condition_shift_backward(
      grad_real, grad_shifted, projected, scale, bias, row_sums, mask, stacked, linear_bias_dtype, output_mask);
  const c10::cuda::CUDAGuard guard(like.device());
  const BranchGradients grads(grad_real, grad_shifted, stacked);
  const bool reads_projected = projected && output_mask[1];
  const at::Tensor dense = reads_projected ? projected->contiguous() : at::Tensor(), kept = dense_mask(mask);
  auto problem = projection_problem(like, scale, bias, row_sums, kept);
  if (reads_projected) problem.projected = dense_rows(dense);
  problem.wide = grads.wide() || (reads_projected && dense.scalar_type() == at::kDouble);
  const bool empty = like.numel() == 0;
  at::Tensor grad_projected = output_mask[0] ? at::empty(like.sizes(), like.options()) : nothing_like(like);
  ParameterGradients<4> parameters(empty);
  if (!empty) {
    const RowChunks chunks = row_chunks(problem.rows, problem.channels);
    parameters.numbers = [=, channels = problem.channels](bool is_vector) {
      return parameter_partials(chunks, channels, is_vector);
    };
  }
  const at::Tensor* const of[4] = {&scale, &bias, &row_sums, &row_sums};
  for (int k = 0; k < 4; ++k)
    parameters.add(k, output_mask[k + 1], *of[k], k == 3 ? linear_bias_dtype : of[k]->scalar_type());
  if (!empty && (output_mask[0] || parameters.any()))
    check_launch(projected_condition_shift_backward(problem, grads.real(), grads.shifted(),
                                                    output_mask[0] ? dense_rows(grad_projected) : absent_rows,
                                                    parameters.gradients, current_stream()));
  const auto& g = parameters.tensors;
  return {grad_projected, g[0], g[1], g[2], g[3]};
}

}  // namespace apex_fast::cuda

APEX_FAST_KERNELS_FOR(CUDA, m) {
  m.impl("projected_condition_shift", &apex_fast::cuda::projected_condition_shift_cuda);
  m.impl("projected_condition_shift_backward", &apex_fast::cuda::projected_condition_shift_backward_cuda);
}
