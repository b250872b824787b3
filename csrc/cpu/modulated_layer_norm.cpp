#include <ATen/ops/empty.h>

#include "common/registration.h"
#include "common/rows.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

namespace {

void check_modulation(const char* op, const char* name, const at::Tensor& values, const at::Tensor& hidden) {
  check_float(op, name, values);
  TORCH_CHECK(values.dim() == 2 && values.size(0) == hidden.size(0) && values.size(1) == hidden.size(-1), op, ": ",
              name, " must be [B, D] = [", hidden.size(0), ", ", hidden.size(-1),
              "], batch and channels of hidden, got ", values.sizes());
  check_device(op, name, values, "hidden", hidden);
}

void check_hidden(const char* op, const at::Tensor& hidden) {
  check_float(op, "hidden", hidden);
  TORCH_CHECK(hidden.dim() >= 2, op, ": hidden must be [B, ..., D], got ", hidden.sizes());
}

ModulatedLayerNormProblem describe(const at::Tensor& dense, const at::Tensor& scale, const at::Tensor& shift,
                                   double eps) {
  const int64_t batch = dense.size(0), channels = dense.size(-1);
  return {batch,
          batch * channels > 0 ? dense.numel() / (batch * channels) : 0,
          channels,
          dense_rows(dense),
          per_channel(scale),
          per_channel(shift),
          eps,
          dense.scalar_type() == at::kDouble};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_cpu(const at::Tensor& hidden,
                                                                        const at::Tensor& scale,
                                                                        const at::Tensor& shift, double eps) {
  constexpr auto op = "modulated_layer_norm";
  check_hidden(op, hidden);
  check_modulation(op, "scale", scale, hidden);
  check_modulation(op, "shift", shift, hidden);
  check_eps(op, eps);
  const auto rows = hidden.sizes().slice(0, hidden.dim() - 1);
  const auto type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty(hidden.sizes(), hidden.options()), mean = at::empty(rows, hidden.options().dtype(type)),
             rstd = at::empty(rows, hidden.options().dtype(type));
  if (hidden.numel() == 0) return {out, mean.zero_(), rstd.zero_()};
  const at::Tensor dense = hidden.contiguous();
  table().modulated_layer_norm(describe(dense, scale, shift, eps), dense_rows(out), mean.mutable_data_ptr(),
                               rstd.mutable_data_ptr());
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> modulated_layer_norm_backward_cpu(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& scale, const at::Tensor& mean,
    const at::Tensor& rstd, at::ScalarType shift_dtype, std::array<bool, 3> output_mask) {
  constexpr auto op = "modulated_layer_norm_backward";
  check_hidden(op, hidden);
  check_sample(op, "grad", grad, "hidden", hidden);
  check_modulation(op, "scale", scale, hidden);
  check_float_type(op, "shift_dtype", shift_dtype);
  const auto type = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = hidden.sizes().slice(0, hidden.dim() - 1);
  for (const auto& [name, values] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    TORCH_CHECK(values->sizes() == rows && values->scalar_type() == type, op, ": ", name, " must be ", type, " ", rows,
                ", as modulated_layer_norm returned it, got ", values->scalar_type(), " ", values->sizes());
    check_device(op, name, *values, "hidden", hidden);
  }
  at::Tensor grad_hidden = output_mask[0] ? at::empty(hidden.sizes(), hidden.options()) : nothing_like(hidden);
  const at::Tensor dense = hidden.contiguous(), upstream = grad.contiguous(), center = mean.contiguous(),
                   inverse = rstd.contiguous();
  const auto problem = describe(dense, scale, scale, 0);
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
