#include <ATen/ops/empty.h>

#include "common/modulated_layer_norm_arguments.h"
#include "common/registration.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_cpu(const at::Tensor& hidden,
                                                                        const at::Tensor& scale,
                                                                        const at::Tensor& shift, double eps) {
  check_modulated_layer_norm(hidden, scale, shift, eps);
  const auto rows = hidden.sizes().slice(0, hidden.dim() - 1);
  const auto type = row_statistics_type(hidden);
  at::Tensor out = at::empty(hidden.sizes(), hidden.options()), mean = at::empty(rows, hidden.options().dtype(type)),
             rstd = at::empty(rows, hidden.options().dtype(type));
  if (hidden.numel() == 0) return {out, mean.zero_(), rstd.zero_()};
  const at::Tensor dense = hidden.contiguous();
  table().modulated_layer_norm(layer_norm_problem(dense, scale, shift, eps), dense_rows(out), mean.mutable_data_ptr(),
                               rstd.mutable_data_ptr());
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_backward_cpu(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& scale, const at::Tensor& mean,
    const at::Tensor& rstd, at::ScalarType shift_dtype, std::array<bool, 3> output_mask) {
  check_modulated_layer_norm_backward(grad, hidden, scale, mean, rstd, shift_dtype);
  at::Tensor grad_hidden = output_mask[0] ? at::empty(hidden.sizes(), hidden.options()) : nothing_like(hidden);
  const at::Tensor dense = hidden.contiguous(), upstream = grad.contiguous(), center = mean.contiguous(),
                   inverse = rstd.contiguous();
  const auto problem = layer_norm_problem(dense, scale, scale, 0);
  const bool sums = output_mask[1] || output_mask[2];
  const int64_t chunks = chunks_of_rows(problem.rows_per_sample, problem.channels);
  ChunkSums scale_sums(problem.batch, chunks, problem.channels, sums),
      shift_sums(problem.batch, chunks, problem.channels, sums);
  if (hidden.numel() > 0)
    table().modulated_layer_norm_backward(
        problem, dense_rows(upstream), center.const_data_ptr(), inverse.const_data_ptr(),
        output_mask[0] ? dense_rows(grad_hidden) : absent_rows, scale_sums.data(), shift_sums.data());
  const at::Tensor like = scale.to(shift_dtype);
  return {grad_hidden, output_mask[1] ? scale_sums.to_tensor(scale) : nothing_like(scale),
          output_mask[2] ? shift_sums.to_tensor(like) : nothing_like(like)};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("modulated_layer_norm", &apex_fast::cpu::modulated_layer_norm_cpu);
  m.impl("modulated_layer_norm_backward", &apex_fast::cpu::modulated_layer_norm_backward_cpu);
}
