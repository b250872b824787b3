#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/condition_shift_arguments.h"
#include "common/registration.h"
#include "cpu/kernels.h"

namespace apex_fast::cpu {

namespace {

static_assert(Rows::max_dims + 1 == max_condition_dims);

Rows rows_of(const at::Tensor& tensor) {
  Rows rows{};
  rows.dims = static_cast<int>(tensor.dim()) - 1;
  for (int d = 0; d < rows.dims; ++d) {
    rows.sizes[d] = tensor.size(d);
    rows.strides[d] = tensor.stride(d);
  }
  rows.channel_stride = tensor.stride(-1);
  rows.data = const_cast<void*>(tensor.const_data_ptr());
  rows.dtype = dtype_of(tensor.scalar_type());
  return rows;
}

Operand parameter_of(const at::Tensor& parameter) {
  return {const_cast<void*>(parameter.const_data_ptr()), dtype_of(parameter.scalar_type()), 0,
          parameter.dim() ? parameter.stride(0) : 0};
}

struct Problem : ConditionShiftProblem {
  Problem(const char* op, const at::Tensor& condition_, const at::Tensor& scale_, const at::Tensor& bias_,
          const std::optional<at::Tensor>& mask_) {
    check_condition_shift(op, condition_, scale_, bias_, mask_);
    if (mask_) {
      keep_ = mask_bytes(*mask_);
      mask = reinterpret_cast<const uint8_t*>(keep_.const_data_ptr<bool>());
    } else {
      mask = nullptr;
    }
    channels = condition_.size(-1);
    rows = channels ? condition_.numel() / channels : 0;
    condition = rows_of(condition_);
    scale = parameter_of(scale_);
    bias = parameter_of(bias_);
    scale_is_vector = scale_.dim() == 1;
    bias_is_vector = bias_.dim() == 1;
    wide = condition_.scalar_type() == at::kDouble;
  }

 private:
  at::Tensor keep_;
};

// Adds up the partial sums of the chunks, in order, into a tensor like `parameter`.
at::Tensor reduce(const std::vector<double>& partials, const at::Tensor& parameter) {
  const int64_t width = parameter.numel();
  at::Tensor sums = at::empty(parameter.sizes(), parameter.options().dtype(at::kDouble)).zero_();
  double* const out = sums.mutable_data_ptr<double>();
  for (size_t i = 0; i < partials.size(); ++i)
    out[i % width] += partials[i];
  return sums.to(parameter.scalar_type());
}

}  // namespace

at::Tensor condition_shift_cpu(const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias,
                               const std::optional<at::Tensor>& mask) {
  const Problem problem("condition_shift", condition, scale, bias, mask);
  at::Tensor shifted = at::empty_like(condition);
  if (condition.numel() > 0) table().condition_shift(problem, rows_of(shifted));
  return shifted;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> condition_shift_backward_cpu(
    const at::Tensor& grad, const at::Tensor& condition, const at::Tensor& scale, const at::Tensor& bias,
    const std::optional<at::Tensor>& mask, std::array<bool, 3> output_mask) {
  constexpr auto op = "condition_shift_backward";
  const Problem problem(op, condition, scale, bias, mask);
  check_sample(op, "grad", grad, "condition", condition);
  at::Tensor grad_condition = output_mask[0] ? at::empty_like(condition) : at::empty({0}, condition.options());
  const int64_t chunk_rows = rows_per_chunk(problem.channels);
  const int64_t chunks = (problem.rows + chunk_rows - 1) / chunk_rows;
  std::vector<double> partial_scale(output_mask[1] ? chunks * scale.numel() : 0);
  std::vector<double> partial_bias(output_mask[2] ? chunks * bias.numel() : 0);
  if (condition.numel() > 0) {
    Rows out = rows_of(grad_condition.dim() == condition.dim() ? grad_condition : condition);
    if (!output_mask[0]) out.data = nullptr;
    table().condition_shift_backward(problem, rows_of(grad), out, output_mask[1] ? partial_scale.data() : nullptr,
                                     output_mask[2] ? partial_bias.data() : nullptr);
  }
  return {grad_condition, output_mask[1] ? reduce(partial_scale, scale) : at::empty({0}, scale.options()),
          output_mask[2] ? reduce(partial_bias, bias) : at::empty({0}, bias.options())};
}

}  // namespace apex_fast::cpu

APEX_FAST_KERNELS_FOR(CPU, m) {
  m.impl("condition_shift", &apex_fast::cpu::condition_shift_cpu);
  m.impl("condition_shift_backward", &apex_fast::cpu::condition_shift_backward_cpu);
}
