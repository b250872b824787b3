#include <ATen/ops/empty.h>

#include "common/condition_shift_rms_norm_arguments.h"
#include "common/registration.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

std::tuple<at::Tensor, at::Tensor> condition_shift_rms_norm_cpu(const at::Tensor& condition, const at::Tensor& scale,
                                                                const at::Tensor& bias, const at::Tensor& weight,
                                                                double eps, const std::optional<at::Tensor>& mask,
                                                                bool stacked, std::array<bool, 2> output_mask) {
  check_condition_shift_rms_norm(condition, scale, bias, weight, eps, mask, stacked, output_mask);
  const auto make = [&](bool wanted) {
    return wanted ? at::empty(branch_sizes(condition, stacked), condition.options()) : nothing_like(condition);
  };
  at::Tensor normed = make(output_mask[0]), shifted = make(output_mask[1] && !stacked);
  if (condition.numel() > 0) {
    const at::Tensor dense = condition.contiguous(), kept = dense_mask(mask);
    const Operand second = stacked ? second_half(normed) : output_mask[1] ? dense_rows(shifted) : absent_rows;
    table().condition_shift_rms_norm(rms_norm_problem(dense, scale, bias, weight, eps, kept),
                                     output_mask[0] ? dense_rows(normed) : absent_rows, second);
  }
  return {normed, shifted};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> condition_shift_rms_norm_backward_cpu(
    const std::optional<at::Tensor>& grad_normed, const std::optional<at::Tensor>& grad_shifted,
    const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias, const at::Tensor& weight, double eps,
    const std::optional<at::Tensor>& mask, bool stacked, std::array<bool, 4> output_mask) {
  check_condition_shift_rms_norm_backward(grad_normed, grad_shifted, condition, scale, bias, weight, eps, mask,
                                          stacked);
  at::Tensor grad_condition =
      output_mask[0] ? at::empty(condition.sizes(), condition.options()) : nothing_like(condition);
  const at::Tensor dense = condition.contiguous(), kept = dense_mask(mask);
  const auto problem = rms_norm_problem(dense, scale, bias, weight, eps, kept);
  const int64_t chunks = chunks_of_rows(problem.rows, problem.channels);
  ChunkSums scale_sums(1, chunks, problem.channels, output_mask[1]),
      bias_sums(1, chunks, problem.channels, output_mask[2]), weight_sums(1, chunks, problem.channels, output_mask[3]);
  if (condition.numel() > 0) {
    const at::Tensor first = grad_normed ? grad_normed->contiguous() : at::Tensor();
    const at::Tensor second = grad_shifted ? grad_shifted->contiguous() : at::Tensor();
    table().condition_shift_rms_norm_backward(problem, grad_normed ? dense_rows(first) : absent_rows,
                                              stacked        ? second_half(first)
                                              : grad_shifted ? dense_rows(second)
                                                             : absent_rows,
                                              output_mask[0] ? dense_rows(grad_condition) : absent_rows,
                                              scale_sums.data(), bias_sums.data(), weight_sums.data());
  }
  return {grad_condition, output_mask[1] ? scale_sums.to_tensor(scale) : nothing_like(scale),
          output_mask[2] ? bias_sums.to_tensor(bias) : nothing_like(bias),
          output_mask[3] ? weight_sums.to_tensor(weight) : nothing_like(weight)};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("condition_shift_rms_norm", &apex_fast::cpu::condition_shift_rms_norm_cpu);
  m.impl("condition_shift_rms_norm_backward", &apex_fast::cpu::condition_shift_rms_norm_backward_cpu);
}
