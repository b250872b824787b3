#include <ATen/ops/empty.h>

#include "common/projected_condition_shift_arguments.h"
#include "common/registration.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

std::tuple<at::Tensor, at::Tensor> projected_condition_shift_cpu(const at::Tensor& projected, const at::Tensor& scale,
                                                                 const at::Tensor& bias, const at::Tensor& row_sums,
                                                                 const std::optional<at::Tensor>& linear_bias,
                                                                 const std::optional<at::Tensor>& mask, bool stacked,
                                                                 std::array<bool, 2> output_mask) {
  check_projected_condition_shift(projected, scale, bias, row_sums, linear_bias, mask, stacked, output_mask);
  const auto make = [&](bool wanted) {
    return wanted ? at::empty(branch_sizes(projected, stacked), projected.options()) : nothing_like(projected);
  };
  at::Tensor real = make(output_mask[0]), shifted = make(output_mask[1] && !stacked);
  if (projected.numel() > 0) {
    const at::Tensor dense = projected.contiguous(), kept = dense_mask(mask);
    auto problem = projection_problem(dense, scale, bias, row_sums, kept);
    problem.projected = dense_rows(dense);
    problem.linear_bias = linear_bias ? per_channel(*linear_bias) : absent_rows;
    const Operand second = stacked ? second_half(real) : output_mask[1] ? dense_rows(shifted) : absent_rows;
    table().projected_condition_shift(problem, output_mask[0] ? dense_rows(real) : absent_rows, second);
  }
  return {real, shifted};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> projected_condition_shift_backward_cpu(
    const std::optional<at::Tensor>& grad_real, const std::optional<at::Tensor>& grad_shifted,
    const std::optional<at::Tensor>& projected, const at::Tensor& scale, const at::Tensor& bias,
    const at::Tensor& row_sums, const std::optional<at::Tensor>& mask, bool stacked, at::ScalarType linear_bias_dtype,
    std::array<bool, 5> output_mask) {
  const at::Tensor like = check_projected_condition_shift_backward(
      grad_real, grad_shifted, projected, scale, bias, row_sums, mask, stacked, linear_bias_dtype, output_mask);
  at::Tensor grad_projected = output_mask[0] ? at::empty(like.sizes(), like.options()) : nothing_like(like);
  const at::Tensor first = grad_real ? grad_real->contiguous() : at::Tensor();
  const at::Tensor second = grad_shifted ? grad_shifted->contiguous() : at::Tensor();
  const at::Tensor dense = projected ? projected->contiguous() : at::Tensor(), kept = dense_mask(mask);
  auto problem = projection_problem(like, scale, bias, row_sums, kept);
  if (projected && output_mask[1]) problem.projected = dense_rows(dense);
  const int64_t channels = problem.channels, chunks = chunks_of_rows(problem.rows, channels);
  const bool sums = output_mask[1] || output_mask[2] || output_mask[3] || output_mask[4];
  ChunkSums product(1, chunks, channels, sums), shifted(1, chunks, channels, sums), all(1, chunks, channels, sums);
  if (like.numel() > 0)
    table().projected_condition_shift_backward(problem, grad_real ? dense_rows(first) : absent_rows,
                                               stacked        ? second_half(first)
                                               : grad_shifted ? dense_rows(second)
                                                              : absent_rows,
                                               output_mask[0] ? dense_rows(grad_projected) : absent_rows,
                                               product.data(), shifted.data(), all.data());
  // Through b W 1: to b the sums weighted with W 1, to W 1 the sums weighted with b.
  at::Tensor grad_bias = nothing_like(bias), grad_row_sums = nothing_like(row_sums);
  if (output_mask[2] || output_mask[3]) {
    const at::Tensor columns = shifted.to_tensor(row_sums.to(at::kDouble));
    if (output_mask[2]) grad_bias = columns.dot(row_sums.to(at::kDouble)).to(bias.scalar_type());
    if (output_mask[3]) grad_row_sums = columns.mul(bias.to(at::kDouble)).to(row_sums.scalar_type());
  }
  const at::Tensor bias_like = at::empty({output_mask[4] ? channels : 0}, like.options().dtype(linear_bias_dtype));
  return {grad_projected, output_mask[1] ? product.to_tensor(scale) : nothing_like(scale), grad_bias, grad_row_sums,
          output_mask[4] ? all.to_tensor(bias_like) : bias_like};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("projected_condition_shift", &apex_fast::cpu::projected_condition_shift_cpu);
  m.impl("projected_condition_shift_backward", &apex_fast::cpu::projected_condition_shift_backward_cpu);
}
